"""Column chunks of a Parquet file in the making: copied from another, built page by page, or encoded by pyarrow."""

from dataclasses import dataclass, field
from typing import TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_cce.jobs.remap.parquet.metadata import (
    CODECS,
    ColumnChunk,
    ColumnMetaData,
    FileMetaData,
    SchemaElement,
    Statistics,
    Type,
)
from torchrec_cce.jobs.remap.parquet.thrift import read_struct

Bytes: TypeAlias = bytes | memoryview | pa.Buffer

_DICTIONARY_BYTES = 4 << 20
_OFFSETS = ("data_page_offset", "index_page_offset", "dictionary_page_offset")
"""Fields of `ColumnMetaData` that count from the start of the file."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A column chunk of a file to be: its bytes, and its entry in the footer with offsets from its own start."""

    parts: list[Bytes]
    entry: ColumnChunk

    def entry_at(self, position: int) -> ColumnChunk:
        """The entry of the chunk if it begins at this byte of the file."""
        return _with_meta(self.entry, _shifted(self.entry.meta_data, position))


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

    def add(self, header: bytes, body: Bytes, uncompressed_size: int) -> None:
        """Add a page. Its uncompressed size is that of the body alone."""
        self.parts += [header, body]
        self.size += len(header) + len(body)
        self.uncompressed_size += len(header) + uncompressed_size

    def finished(self, raw: ColumnMetaData, name: str, compression: str | None) -> Chunk:
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
            meta.statistics.null_count = raw.statistics.null_count
        meta.encoding_stats = raw.encoding_stats
        return Chunk(parts=self.parts, entry=_with_meta(ColumnChunk(), meta))


def start_of(meta: ColumnMetaData) -> int:
    """The first byte of a chunk in its file."""
    offsets = (meta.data_page_offset, meta.index_page_offset, meta.dictionary_page_offset)
    return min(offset for offset in offsets if offset is not None and offset > 0)


def copied(entry: ColumnChunk, data: bytes) -> Chunk:
    """A raw chunk; indexes and Bloom filters, which lie elsewhere in the file, are left out."""
    meta = ColumnMetaData(entry.meta_data)
    meta.bloom_filter_offset = meta.bloom_filter_length = None
    for name in _OFFSETS:
        if (getattr(meta, name) or 0) <= 0:  # how some writers say that there is no such page
            setattr(meta, name, None)
    return Chunk(parts=[data], entry=_with_meta(ColumnChunk(), _shifted(meta, -start_of(entry.meta_data))))


def encoded(table: pa.Table, compression: str | None) -> list[Chunk]:
    """The chunks of a table, encoded by pyarrow as one row group."""
    data, footer = _written(table.schema, table, compression)
    (group,) = footer.row_groups
    chunks = []
    for entry in group.columns:
        start = start_of(entry.meta_data)
        chunks.append(copied(entry, data[start : start + entry.meta_data.total_compressed_size]))
    return chunks


def elements_of(schema: pa.Schema) -> list[SchemaElement]:
    """The elements of a Parquet schema, without its root."""
    _, footer = _written(schema, None, None)
    return footer.schema[1:]


def _with_meta(entry: ColumnChunk, meta: ColumnMetaData) -> ColumnChunk:
    """A copy of an entry with other metadata. As in most files, `file_offset` is 0: it is deprecated."""
    entry = ColumnChunk(entry)
    entry.file_offset = 0
    entry.meta_data = meta
    return entry


def _shifted(meta: ColumnMetaData, by: int) -> ColumnMetaData:
    """A copy with its offsets moved by so many bytes."""
    meta = ColumnMetaData(meta)
    for name in _OFFSETS:
        offset = getattr(meta, name)
        if offset is not None:
            setattr(meta, name, offset + by)
    return meta


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
    ) as writer:
        if table is not None and len(table):
            writer.write_table(table, row_group_size=len(table))
    data = sink.getvalue().to_pybytes()
    length = int.from_bytes(data[-8:-4], "little")
    return data, read_struct(FileMetaData, data, len(data) - 8 - length)[0]
