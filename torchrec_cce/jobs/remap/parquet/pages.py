"""Raw IDs to index pointers within the pages of a Parquet column chunk, without decoding its rows.

A pointer depends on its ID alone. Where a chunk holds a dictionary and indices into it, as most writers make them, only
the dictionary's IDs are looked up, and the pages of indices and of nulls stay as they are. Pages of plain IDs are
looked up one by one.
"""

from collections import Counter
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from torchrec_cce.jit import jit
from torchrec_cce.jobs.remap.parquet.chunks import Bytes, Chunk, GrowingChunk
from torchrec_cce.jobs.remap.parquet.footer import FieldPlan
from torchrec_cce.jobs.remap.parquet.metadata import (
    CODECS,
    ColumnMetaData,
    DataPageHeader,
    DataPageHeaderV2,
    Encoding,
    PageHeader,
    PageType,
    Type,
)
from torchrec_cce.jobs.remap.parquet.page import RawChunk, signed_crc
from torchrec_cce.jobs.remap.parquet.thrift import write_struct
from torchrec_cce.jobs.remap.remapper import UnseenCounts, Words

_HEADER_BITS = 35
_NONE = np.empty(0, np.bool_)
_DEFINED = np.array([False, True])
"""Of the definition levels 0 and 1, those with a value."""
_DICTIONARIES = (Encoding.PLAIN_DICTIONARY, Encoding.RLE_DICTIONARY)

_KEPT = (1, 5, 7, 8)
"""Fields that the header of a new page has of the raw one's: its type, and the headers of its kind of page."""

_Marks: TypeAlias = dict[str, npt.NDArray[np.bool_]]
"""Key of a feature → which of some IDs its map does not know; no features of which it knows all."""


class CannotRewrite(Exception):
    """The pages are not of a kind that is rewritten here, or hold an ID that the map does not know: decode the rows."""


def rewrite_chunk(raw: RawChunk, plan: FieldPlan, compression: str | None) -> tuple[list[Chunk], UnseenCounts]:
    """The chunks of a field's new columns, and how many IDs of the rows the maps of its features do not know.

    Args:
        raw: the chunk.
        compression: pyarrow's name of the codec to write, None for no compression.

    Raises:
        CannotRewrite
    """
    rewriting = _Rewriting(raw.meta, plan, compression)
    for page in raw.pages:
        if page.data is not None:
            rewriting.data_page(page.head, page.data, page.body)
        elif page.head.type == PageType.DICTIONARY_PAGE:
            rewriting.dictionary(page.head, page.body)
    return rewriting.chunks(), rewriting.unseen


class _Rewriting:
    """The new columns of one chunk while its pages are rewritten. Arguments: as `rewrite_chunk`."""

    def __init__(self, meta: ColumnMetaData, plan: FieldPlan, compression: str | None) -> None:
        self.unseen: UnseenCounts = Counter()
        self._meta = meta
        self._features, self._optional = plan.features, plan.optional
        self._compression = compression
        self._recoder = _Recoder(CODECS[meta.codec], compression)
        self._dtype = np.dtype({Type.INT32: "<u4" if plan.unsigned else "<i4", Type.INT64: "<i8"}[Type(meta.type)])
        self._names = plan.new_names
        self._columns = [GrowingChunk() for _ in self._names]
        self._num_nulls = 0
        self._marks: _Marks = {}
        """Of the dictionary's IDs."""
        self._num_known = 0
        """The dictionary's IDs, 0 before there is one."""
        self._scratch = np.empty(0, np.uint8)

    def dictionary(self, head: PageHeader, body: memoryview) -> None:
        assert head.dictionary_page_header is not None
        self._num_known = head.dictionary_page_header.num_values
        content = self._recoder.unpacked(body, head.uncompressed_page_size)
        words, self._marks = self._look_up(content, self._num_known)
        for column in self._columns:
            column.dictionary_at = column.size
        self._add_words(head, b"", words)

    def data_page(self, head: PageHeader, page: DataPageHeader | DataPageHeaderV2, body: memoryview) -> None:
        page.statistics = None  # of raw IDs
        for column in self._columns:
            column.data_at = column.size if column.data_at is None else column.data_at
        if page.encoding in _DICTIONARIES:
            self._indices(head, page, body)
        elif page.encoding == Encoding.PLAIN and isinstance(page, DataPageHeader):
            self._plain(head, page, body)
        else:
            raise CannotRewrite

    def chunks(self) -> list[Chunk]:
        return [
            column.finished(self._meta, name, self._compression, self._num_nulls)
            for column, name in zip(self._columns, self._names, strict=True)
        ]

    def _indices(self, head: PageHeader, page: DataPageHeader | DataPageHeaderV2, body: memoryview) -> None:
        """A page of indices into the dictionary stays as it is, once it is seen that all of them are in it."""
        if isinstance(page, DataPageHeaderV2) and self._recoder.changes:
            raise CannotRewrite
        size = head.uncompressed_page_size
        content, indices, count = self._opened(head, page, body)
        if count:
            data, bit_width = np.frombuffer(indices[1:], np.uint8), indices[0]
            for key, marks in self._marks.items():
                self.unseen[key] += _count(data, bit_width, count, self._num_known, marks)
            if not self._marks:
                _count(data, bit_width, count, self._num_known, _NONE)
        packed = self._recoder.packed(content) if self._recoder.changes else body
        header = _header(head, size, packed)
        for column in self._columns:
            column.add(header, packed, size)

    def _plain(self, head: PageHeader, page: DataPageHeader, body: memoryview) -> None:
        content, values, count = self._opened(head, page, body)
        words, marks = self._look_up(values, count)
        self.unseen.update({key: int(np.count_nonzero(marked)) for key, marked in marks.items()})
        self._add_words(head, content[: len(content) - len(values)], words)

    def _opened(
        self, head: PageHeader, page: DataPageHeader | DataPageHeaderV2, body: memoryview
    ) -> tuple[memoryview, memoryview, int]:
        """The content of a page, the part of it after its levels, and how many values that has to have, without nulls.

        The content of a page of the second version is the part after the levels alone.
        """
        count = page.num_values
        if isinstance(page, DataPageHeaderV2):
            size = page.definition_levels_byte_length
            if page.repetition_levels_byte_length or bool(size) > self._optional:
                raise CannotRewrite
            levels, content = body[:size], body[size:]
            if page.is_compressed is not False:
                content = self._recoder.unpacked(content, head.uncompressed_page_size - size)
            values = content
        else:
            content = self._recoder.unpacked(body, head.uncompressed_page_size)
            size = 4 + int.from_bytes(content[:4], "little") if self._optional else 0
            if size > len(content) or (self._optional and page.definition_level_encoding != Encoding.RLE):
                raise CannotRewrite
            levels, values = content[4:size], content[size:]
        if self._optional:
            count = _count(np.frombuffer(levels, np.uint8), 1, count, 2, _DEFINED)
        self._num_nulls += page.num_values - count
        if count and not len(values):
            raise CannotRewrite
        if isinstance(page, DataPageHeaderV2) and count != page.num_values - page.num_nulls:
            raise CannotRewrite
        return content, values, count

    def _look_up(self, values: memoryview, count: int) -> tuple[Words, _Marks]:
        if len(values) != count * self._dtype.itemsize:
            raise CannotRewrite
        ids = np.frombuffer(values, self._dtype).astype(np.int64, copy=False)
        found = [feature.find(ids) for feature in self._features]
        if any(resolved.bad >= 0 for _, resolved in found):
            raise CannotRewrite
        marks = {
            feature.key: resolved.unseen
            for feature, (_, resolved) in zip(self._features, found, strict=True)
            if resolved.unseen is not None
        }
        return [word for words, _ in found for word in words], marks

    def _add_words(self, head: PageHeader, levels: bytes | memoryview, words: Words) -> None:
        """Add a page of plain words to each column: a dictionary, or levels and values."""
        for column, word in zip(self._columns, words, strict=True):
            values = word.astype("<u8", copy=False).data.cast("B")
            content = self._joined(levels, values) if len(levels) else values
            body = self._recoder.packed(content)
            column.add(_header(head, len(content), body), body, len(content))

    def _joined(self, levels: bytes | memoryview, values: memoryview) -> bytes | memoryview:
        if self._compression is None:
            return b"".join((levels, values))
        # What is compressed need not stay: large new memory costs as much as the copy.
        size = len(levels) + len(values)
        if len(self._scratch) < size:
            self._scratch = np.empty(size, np.uint8)
        content = self._scratch[:size]
        content[: len(levels)] = np.frombuffer(levels, np.uint8)
        content[len(levels) :] = np.frombuffer(values, np.uint8)
        return content.data


class _Recoder:
    """From the codec of a chunk to that of the new one."""

    def __init__(self, old: str | None, new: str | None) -> None:
        self.changes = old != new
        self._old = None if old is None else pa.Codec(old)
        self._new = None if new is None else pa.Codec(new)

    def unpacked(self, body: memoryview, size: int) -> memoryview:
        return body if self._old is None else memoryview(self._old.decompress(body, size))

    def packed(self, content: bytes | memoryview) -> Bytes:
        return content if self._new is None else self._new.compress(content)


def _count(data: npt.NDArray[np.uint8], bit_width: int, count: int, limit: int, marks: npt.NDArray[np.bool_]) -> int:
    """As `scanned`. Raises CannotRewrite where that is -1."""
    found = scanned(data, bit_width, count, limit, marks)
    if found < 0:
        raise CannotRewrite
    return found


def _header(raw: PageHeader, uncompressed_size: int, body: Bytes) -> bytes:
    """The header of a new page: the raw one's with other sizes and another checksum."""
    new = PageHeader({number: raw[number] for number in _KEPT if number in raw})
    new.uncompressed_page_size = uncompressed_size
    new.compressed_page_size = len(body)
    new.crc = signed_crc(body)
    return write_struct(new)


def count_marked(data: npt.NDArray[np.uint8], bit_width: int, count: int, marks: npt.NDArray[np.bool_]) -> int:
    """How many of the first `count` values in `data` are marked; `marks: [v]` is for each of the values 0 to `v - 1`.

    Arguments and result: as `scanned`.
    """
    return scanned(data, bit_width, count, len(marks), marks)


@jit
def scanned(data: npt.NDArray[np.uint8], bit_width: int, count: int, limit: int, marks: npt.NDArray[np.bool_]) -> int:
    """How many of the first `count` values in `data` are marked, without decoding all of them to an array.

    Dictionary indices and levels are in Parquet's hybrid of runs and bit packing. A header, which is a varint, precedes
    each part. After the header `2·n`, one value follows that stands for `n` of them; after `2·n + 1`, `8·n` values
    follow, each in `bit_width` bits, the first in the lowest.

    Args:
        bit_width: 0 to 32.
        limit: the values are below it.
        marks: [limit], which of them are marked, or empty if none is.

    Returns:
        The number, or -1 if `data` does not hold so many values and nothing after them, or a value is not below the
        limit.
    """
    if not 0 <= bit_width <= 32:
        return -1
    width = np.uint64(bit_width)
    mask = (np.uint64(1) << width) - np.uint64(1)
    most = np.uint64(limit)
    some = len(marks) > 0
    position, left, found, end = 0, count, 0, 0
    while left > 0:
        header, shift = 0, 0
        while True:
            if position >= len(data) or shift >= _HEADER_BITS:
                return -1
            byte = np.int64(data[position])
            position += 1
            header |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        packed = header & 1
        # The last eight values may be cut short, and some of them are none.
        end = position + ((header >> 1) * bit_width if packed else (bit_width + 7) // 8)
        run = min((header >> 1) * (8 if packed else 1), left)
        stop = position + ((run * bit_width if packed else bit_width) + 7) // 8
        if run == 0 or stop > len(data):
            return -1
        buffer, bits = np.uint64(0), np.uint64(0)
        # Where all that the bits can say is right, and nothing marked, there is nothing to see.
        for _ in range(0 if mask < most and not some else run if packed else 1):
            while bits < width:
                buffer |= np.uint64(data[position]) << bits
                position += 1
                bits += np.uint64(8)
            value = buffer & mask
            buffer >>= width
            bits -= width
            if value >= most:
                return -1
            if some and marks[value]:
                found += 1 if packed else run
        position = stop
        left -= run
    return found if len(data) <= end else -1
