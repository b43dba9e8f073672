"""The pages of a raw column chunk, found by their headers, which must be true."""

from collections.abc import Callable
from typing import NamedTuple
from zlib import crc32

import numpy as np
import numpy.typing as npt

from torchrec_cce.jobs.remap.parquet.header import FAULTS, Page, read_pages
from torchrec_cce.jobs.remap.parquet.metadata import ColumnMetaData, PageType

_UNCOMPRESSED = 0


class RawChunk(NamedTuple):
    """A chunk as it is in a file."""

    meta: ColumnMetaData
    data: bytes
    """From the first page's header to the end of the last page."""
    pages: list[Page]
    table: npt.NDArray[np.int64]
    """The same as [pages, fields of `Page`]."""


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
        ValueError: the headers do not hold together, or a page is not what its CRC says.
    """
    start, size = start_of(meta), meta.total_compressed_size
    data = read(size, start)
    try:
        return _chunk(data, meta)
    except ValueError:
        left_out = _dictionary_header(data, meta)
        if not left_out:
            raise
        longer = read(size + left_out, start)
        chunk = _chunk(longer, meta)
        if len(chunk.data) != len(longer):
            raise
        return chunk


def signed_crc(body: memoryview | bytes) -> int:
    """The CRC-32 of a page's bytes, as its header has it."""
    found = crc32(body)
    return found - (1 << 32) if found >> 31 else found


def _dictionary_header(data: bytes, meta: ColumnMetaData) -> int:
    """Bytes of the header of the dictionary's page, 0 if a chunk does not begin with one."""
    _, _, table = read_pages(np.frombuffer(data, np.uint8), 1, meta.codec == _UNCOMPRESSED)
    first = Page._make(table[0].tolist())
    return first.body if first.kind == PageType.DICTIONARY_PAGE else 0


def _chunk(data: bytes, meta: ColumnMetaData) -> RawChunk:
    """The chunk, of which `data` may have more bytes."""
    count, stop, table = read_pages(np.frombuffer(data, np.uint8), meta.num_values, meta.codec == _UNCOMPRESSED)
    if count < 0:
        raise ValueError(FAULTS[count])
    table = table[:count]
    pages = list(map(Page._make, table.tolist()))
    for page in pages:
        if page.has_crc and page.crc != signed_crc(memoryview(data)[page.body : page.stop]):
            raise ValueError("the bytes of a page and their CRC differ: it is damaged")
    return RawChunk(meta, data if stop == len(data) else data[:stop], pages, table)
