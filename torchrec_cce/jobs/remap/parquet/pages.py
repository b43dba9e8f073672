"""Raw IDs to index pointers within the pages of a Parquet column chunk, without decoding its rows.

A pointer depends on its ID alone. Where a chunk holds a dictionary and indices into it, as most writers make them, only
the dictionary's IDs are looked up, and the pages of indices and of nulls stay as they are. Pages of plain IDs are
looked up one by one.
"""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from torchrec_cce.jobs.remap.parquet.chunks import Chunk, GrowingChunk
from torchrec_cce.jobs.remap.parquet.footer import FieldPlan
from torchrec_cce.jobs.remap.parquet.header import MOST_HEADER_BYTES, Page, write_again, write_header
from torchrec_cce.jobs.remap.parquet.hybrid import DEFINED, NO_MARKS, count_indices, skip_levels
from torchrec_cce.jobs.remap.parquet.metadata import CODECS, DATA_PAGES, Encoding, PageType, Type
from torchrec_cce.jobs.remap.parquet.page import RawChunk, signed_crc
from torchrec_cce.jobs.remap.parquet.recoder import Bytes, Recoder
from torchrec_cce.jobs.remap.remapper import UnseenCounts, Words

_DICTIONARIES = (Encoding.PLAIN_DICTIONARY, Encoding.RLE_DICTIONARY)
_TOGETHER_BYTES = 1 << 18
"""Of pages of indices that are looked at together; what is more does not stay in a processor's cache."""

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
    rewriting = _Rewriting(raw, plan, compression)
    rewriting.rewrite()
    return rewriting.chunks(), rewriting.unseen


class _Rewriting:
    """The new columns of one chunk while its pages are rewritten. Arguments: as `rewrite_chunk`."""

    def __init__(self, raw: RawChunk, plan: FieldPlan, compression: str | None) -> None:
        self.unseen = UnseenCounts()
        self._raw = raw
        self._data = np.frombuffer(raw.data, np.uint8)
        self._features, self._optional = plan.features, plan.optional
        self._compression = compression
        self._recoder = Recoder(raw.data, CODECS[raw.meta.codec], compression)
        self._dtype = np.dtype({Type.INT32: "<u4" if plan.unsigned else "<i4", Type.INT64: "<i8"}[Type(raw.meta.type)])
        self._names = plan.new_names
        self._columns = [GrowingChunk() for _ in self._names]
        self._num_nulls = 0
        self._marks: _Marks = {}
        """Of the dictionary's IDs."""
        self._num_known = 0
        """The dictionary's IDs, 0 before there is one."""
        self._scratch = np.empty(0, np.uint8)

    def rewrite(self) -> None:
        pages, number = self._raw.pages, 0
        while number < len(pages):
            page, first = pages[number], number
            number += 1
            if page.kind == PageType.DICTIONARY_PAGE:
                self._dictionary(first)
            if page.kind not in DATA_PAGES:
                continue
            for column in self._columns:
                column.data_at = column.size if column.data_at is None else column.data_at
            if _has_indices(page):
                size = page.uncompressed_size
                while number < len(pages) and _has_indices(pages[number]):
                    size += pages[number].uncompressed_size
                    if size > _TOGETHER_BYTES:
                        break
                    number += 1
                self._indices(slice(first, number))
            elif page.encoding == Encoding.PLAIN and page.kind == PageType.DATA_PAGE:
                self._plain(first)
            else:
                raise CannotRewrite

    def chunks(self) -> list[Chunk]:
        return [
            column.finished(self._raw.meta, name, self._compression, self._num_nulls)
            for column, name in zip(self._columns, self._names, strict=True)
        ]

    def _dictionary(self, number: int) -> None:
        page = self._raw.pages[number]
        self._num_known = page.num_values
        words, self._marks = self._look_up(self._recoder.unpacked(page), self._num_known)
        for column in self._columns:
            column.dictionary_at = column.size
        self._add_words(number, b"", words)

    def _indices(self, some: slice) -> None:
        """Pages of indices into the dictionary stay as they are, once it is seen that all of them are in it."""
        pages, table = self._raw.pages[some], self._raw.table[some]
        if self._recoder.changes and any(page.kind == PageType.DATA_PAGE_V2 for page in pages):
            raise CannotRewrite
        content, parts = self._recoder.all_unpacked(pages, table)
        array, nulls = np.frombuffer(content, np.uint8), 0
        for key, marks in self._marks.items() or (("", NO_MARKS),):
            found, nulls = count_indices(
                self._data, table, array, parts, self._optional, self._num_known, marks, DEFINED
            )
            if found < 0:
                raise CannotRewrite
            if self._marks:
                self.unseen[key] += found
        self._num_nulls += nulls
        if self._recoder.changes:
            for number, (start, stop) in zip(range(some.start, some.stop), parts.tolist(), strict=True):
                self._add_page(number, self._recoder.packed(content[start:stop]), stop - start, self._columns)
        else:
            self._add_again(pages, table)

    def _add_again(self, pages: list[Page], table: npt.NDArray[np.int64]) -> None:
        """Add pages as they are to all columns, but for their headers."""
        view = memoryview(self._raw.data)
        crcs = [page.crc if page.has_crc else signed_crc(view[page.body : page.stop]) for page in pages]
        num_bytes = sum(page.stop - page.body for page in pages)
        most = num_bytes + sum(MOST_HEADER_BYTES + self._kept_bytes(page) for page in pages)
        out = np.empty(most, np.uint8)
        size = write_again(out, self._data, table, np.array(crcs))
        block = out[:size].data
        uncompressed_size = size - num_bytes + sum(page.uncompressed_size for page in pages)
        for column in self._columns:
            column.add(block, uncompressed_size)

    def _plain(self, number: int) -> None:
        page = self._raw.pages[number]
        content = self._recoder.unpacked(page)
        first, count = 0, page.num_values
        if self._optional:
            array = np.frombuffer(content, np.uint8)
            first, count = skip_levels(array, 0, len(content), count, page.level_encoding, DEFINED)
            if first < 0:
                raise CannotRewrite
            self._num_nulls += page.num_values - count
        words, marks = self._look_up(content[first:], count)
        self.unseen.update({key: int(np.count_nonzero(marked)) for key, marked in marks.items()})
        self._add_words(number, content[:first], words)

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

    def _add_words(self, number: int, levels: bytes | memoryview, words: Words) -> None:
        """Add a page of plain words to each column: a dictionary, or levels and values."""
        for column, word in zip(self._columns, words, strict=True):
            values = word.astype("<u8", copy=False).data.cast("B")
            content = self._joined(levels, values) if len(levels) else values
            self._add_page(number, self._recoder.packed(content), len(content), [column])

    def _add_page(self, number: int, body: Bytes, uncompressed_size: int, columns: list[GrowingChunk]) -> None:
        """Add a new page, with a header as that of a raw one."""
        page = self._raw.pages[number]
        out = np.empty(MOST_HEADER_BYTES + self._kept_bytes(page), np.uint8)
        size = write_header(out, 0, self._data, self._raw.table[number], uncompressed_size, len(body), signed_crc(body))
        for column in columns:
            column.add(out[:size].data, size)
            column.add(body, uncompressed_size)

    @staticmethod
    def _kept_bytes(page: Page) -> int:
        """Of its header, in that of the new page."""
        if page.kept_stop < 0:
            raise CannotRewrite
        return page.kept_stop - page.kept

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


def _has_indices(page: Page) -> bool:
    return page.encoding in _DICTIONARIES and page.kind in DATA_PAGES
