"""The pages of a raw column chunk, found by their headers, which must be true."""

from collections.abc import Callable
from typing import NamedTuple
from zlib import crc32

from torchrec_cce.jobs.remap.parquet.metadata import (
    ENCODINGS,
    ColumnMetaData,
    DataPageHeader,
    DataPageHeaderV2,
    Encoding,
    PageHeader,
    PageType,
)
from torchrec_cce.jobs.remap.parquet.thrift import read_struct

_UNCOMPRESSED = 0
_OF_DICTIONARIES = (Encoding.PLAIN, Encoding.PLAIN_DICTIONARY)


class Page(NamedTuple):
    head: PageHeader
    data: DataPageHeader | DataPageHeaderV2 | None
    """What the header says of a page of data; None of another."""
    start: int
    """The first byte of the header in the chunk."""
    body: memoryview


class RawChunk(NamedTuple):
    """A chunk as it is in a file."""

    meta: ColumnMetaData
    data: bytes
    """From the first page's header to the end of the last page."""
    pages: list[Page]


def start_of(meta: ColumnMetaData) -> int:
    """The first byte of a chunk in its file."""
    dictionary, data = meta.dictionary_page_offset or 0, meta.data_page_offset
    return dictionary if 0 < dictionary < data else data


def read_chunk(read: Callable[[int, int], bytes], meta: ColumnMetaData) -> RawChunk:
    """A chunk of which the footer says `meta`.

    Where it ends is told by its pages, which have all its values. parquet-mr up to 1.2.8 wrote a compressed size that
    leaves out the header of the dictionary's page (PARQUET-816); as other readers do, this one makes up for it.

    Args:
        read: gets so many bytes, from the position on that follows; raises ValueError if they are not there.

    Raises:
        ValueError, IndexError: the headers do not hold together, or a page is not what its CRC says.
    """
    start, size = start_of(meta), meta.total_compressed_size
    data = read(size, start)
    try:
        pages, end = _pages(data, meta)
    except (ValueError, IndexError):
        left_out = _dictionary_header(data)
        if not left_out:
            raise
        data = read(size + left_out, start)
        pages, end = _pages(data, meta)
        if end != len(data):
            raise
    return RawChunk(meta, data[:end], pages)


def signed_crc(body: memoryview | bytes) -> int:
    """The CRC-32 of a page's bytes, as its header has it."""
    found = crc32(body)
    return found - (1 << 32) if found >> 31 else found


def _dictionary_header(data: bytes) -> int:
    """Bytes of the header of the dictionary's page, 0 if a chunk does not begin with one."""
    head, size = read_struct(PageHeader, data)
    return size if head.type == PageType.DICTIONARY_PAGE else 0


def _pages(data: bytes, meta: ColumnMetaData) -> tuple[list[Page], int]:
    """The pages that have the values of a chunk, and the byte after them."""
    pages: list[Page] = []
    view, position, values_left = memoryview(data), 0, meta.num_values
    while values_left > 0:
        at = position
        head, start = read_struct(PageHeader, data, at)
        size = head.compressed_page_size
        position = start + size
        if not 0 <= size <= len(data) - start:
            raise ValueError(f"a page of {size} bytes does not lie in its column chunk")
        body = view[start:position]
        if head.crc is not None and head.crc != signed_crc(body):
            raise ValueError("the bytes of a page and their CRC differ: it is damaged")
        page = _data_header(head)
        if page is not None:
            values_left -= page.num_values
        elif head.type == PageType.DICTIONARY_PAGE and pages:
            raise ValueError("the page of a dictionary is not the first of its column chunk")
        uncompressed = head.uncompressed_page_size
        if uncompressed < 0 or (meta.codec == _UNCOMPRESSED and uncompressed != size):
            raise ValueError(f"a page of {size} bytes says that it has {uncompressed} when it is not compressed")
        pages.append(Page(head, page, at, body))
    if values_left < 0:
        raise ValueError(f"the pages of a column chunk have more than its {meta.num_values} values")
    return pages, position


def _data_header(head: PageHeader) -> DataPageHeader | DataPageHeaderV2 | None:
    """The header of a page of data, None for another page. Raises ValueError if it cannot be true."""
    if head.type == PageType.DATA_PAGE:
        page: DataPageHeader | DataPageHeaderV2 | None = head.data_page_header
    elif head.type == PageType.DATA_PAGE_V2:
        second = page = head.data_page_header_v2
        if second is not None:
            levels = second.definition_levels_byte_length, second.repetition_levels_byte_length
            is_true = min(levels) >= 0 and sum(levels) <= head.compressed_page_size
            if not is_true or not 0 <= second.num_nulls <= second.num_values:
                raise ValueError("the header of a page has levels or nulls that do not fit into it")
    elif head.type == PageType.INDEX_PAGE:
        return None
    elif head.type == PageType.DICTIONARY_PAGE:
        dictionary = head.dictionary_page_header
        if dictionary is None or dictionary.num_values < 0 or dictionary.encoding not in _OF_DICTIONARIES:
            raise ValueError("the page of a dictionary has no header that can be true")
        return None
    else:
        raise ValueError(f"a page has the type {head.type}, which Parquet does not have")
    if page is None or page.num_values < 0 or page.encoding not in ENCODINGS:
        raise ValueError("a page of data has no header that can be true")
    return page
