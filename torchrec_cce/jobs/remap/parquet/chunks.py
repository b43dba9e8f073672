"""Column chunks of a Parquet file in the making: copied from another, built page by page, or encoded by pyarrow."""

from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_cce.jobs.remap.parquet.metadata import (
    CODECS,
    DATA_PAGES,
    ColumnMetaData,
    FileMetaData,
    PageType,
    SchemaElement,
    Statistics,
    Type,
)
from torchrec_cce.jobs.remap.parquet.page import RawChunk, read_chunk
from torchrec_cce.jobs.remap.parquet.recoder import Bytes
from torchrec_cce.jobs.remap.parquet.thrift import Raw, read_struct, write_struct

_DICTIONARY_BYTES = 4 << 20


class Chunk(NamedTuple):
    """A column chunk of a file to be: its bytes, and what the footer says of it, with offsets from its own start."""

    parts: list[Bytes]
    num_bytes: int
    uncompressed_bytes: int
    offsets: ColumnMetaData
    """The fields with offsets."""
    before: bytes
    after: bytes
    """The fields before and after those, as they are written."""

    @classmethod
    def of(cls, parts: list[Bytes], meta: ColumnMetaData) -> "Chunk":
        """A chunk that is described by `meta`."""
        offsets = ColumnMetaData()
        offsets.data_page_offset, offsets.dictionary_page_offset = meta.data_page_offset, meta.dictionary_page_offset
        first, last = min(offsets), max(offsets)
        before = write_struct(ColumnMetaData({number: meta[number] for number in meta if number < first}))[:-1]
        after = write_struct(ColumnMetaData({number: meta[number] for number in meta if number > last}), after=last)
        return cls(parts, meta.total_compressed_size, meta.total_uncompressed_size, offsets, before, after)

    def entry_at(self, position: int) -> Raw:
        """The `ColumnChunk` of the footer, as it is written, if the chunk begins at this byte of the file."""
        offsets = ColumnMetaData({number: (kind, value + position) for number, (kind, value) in self.offsets.items()})
        return Raw(_ENTRY + self.before + write_struct(offsets, after=_LAST_BEFORE)[:-1] + self.after + _END)


_ENTRY = b"\x26\x00\x1c"
"""How a `ColumnChunk` begins: field 2, a deprecated offset that is 0 in most files, and a struct in field 3."""
_END = b"\x00"
_LAST_BEFORE = 7
"""The last field before the offsets, which is never absent."""


@dataclass(kw_only=True)
class GrowingChunk:
    """The chunk of a new column of 64-bit words, as its pages are added."""

    parts: list[Bytes] = field(default_factory=list)
    dictionary_at: int | None = None
    """First byte of the dictionary page."""
    data_at: int | None = None
    """First byte of the first data page."""
    size: int = 0
    uncompressed_size: int = 0

    def add(self, part: Bytes, uncompressed_size: int) -> None:
        """Add a part: a header, a body, or whole pages."""
        self.parts.append(part)
        self.size += len(part)
        self.uncompressed_size += uncompressed_size

    def finished(self, raw: ColumnMetaData, name: str, compression: str | None, num_nulls: int) -> Chunk:
        """The chunk, described by what is known of the raw one and still true."""
        meta = ColumnMetaData()
        meta.type = Type.INT64
        meta.encodings = raw.encodings
        meta.path_in_schema = [name.encode()]
        meta.codec = next(number for number, codec in CODECS.items() if codec == compression)
        meta.num_values = raw.num_values
        meta.total_uncompressed_size = self.uncompressed_size
        meta.total_compressed_size = self.size
        meta.data_page_offset = self.data_at or 0
        meta.dictionary_page_offset = self.dictionary_at
        if raw.statistics is not None and raw.statistics.null_count is not None:
            meta.statistics = Statistics()
            meta.statistics.null_count = num_nulls
        meta.encoding_stats = raw.encoding_stats
        return Chunk.of(self.parts, meta)


def copied(raw: RawChunk) -> Chunk:
    """A raw chunk; indexes and Bloom filters, which lie elsewhere in the file, are left out.

    Where its pages are, and their sizes, is what they say themselves.
    """
    meta = ColumnMetaData(raw.meta)
    meta.bloom_filter_offset = meta.bloom_filter_length = meta.index_page_offset = None
    has_dictionary = bool(raw.pages) and raw.pages[0].kind == PageType.DICTIONARY_PAGE
    meta.dictionary_page_offset = 0 if has_dictionary else None
    meta.data_page_offset = next((page.start for page in raw.pages if page.kind in DATA_PAGES), 0)
    size = uncompressed_size = len(raw.data)
    for page in raw.pages:
        uncompressed_size += page.uncompressed_size - (page.stop - page.body)
    meta.total_compressed_size, meta.total_uncompressed_size = size, uncompressed_size
    return Chunk.of([raw.data], meta)


def encoded(table: pa.Table, compression: str | None) -> list[Chunk]:
    """The chunks of a table, encoded by pyarrow as one row group."""
    data, footer = _written(table.schema, table, compression)
    (group,) = footer.row_groups
    return [
        copied(read_chunk(lambda size, start: data[start : start + size], entry.meta_data)) for entry in group.columns
    ]


def elements_of(schema: pa.Schema) -> list[SchemaElement]:
    """The elements of a Parquet schema, without its root."""
    _, footer = _written(schema, None, None)
    return footer.schema[1:]


def _written(schema: pa.Schema, table: pa.Table | None, compression: str | None) -> tuple[bytes, FileMetaData]:
    """A Parquet file and its footer. Without a table it has no row group; an empty one would have pandas imported."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        schema,
        compression="lz4" if compression == "lz4_raw" else compression or "none",
        write_statistics=False,
        dictionary_pagesize_limit=_DICTIONARY_BYTES,
        store_schema=False,
        write_page_checksum=True,
    ) as writer:
        if table is not None and len(table):
            writer.write_table(table, row_group_size=len(table))
    data = sink.getvalue().to_pybytes()
    length = int.from_bytes(data[-8:-4], "little")
    return data, read_struct(FileMetaData, data, len(data) - 8 - length)[0]
