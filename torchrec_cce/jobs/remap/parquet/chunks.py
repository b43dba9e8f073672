"""Column chunks of a Parquet file in the making: copied from another, or encoded by pyarrow."""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_cce.jobs.remap.parquet.thrift import Struct, i64, read_struct

_DICTIONARY_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A column chunk in a file to be: its bytes, and its entry in the footer with offsets from its own start."""

    parts: list[bytes | memoryview | pa.Buffer]
    entry: Struct
    """`ColumnChunk`."""


def start_of(meta: Struct) -> int:
    """Where a chunk begins, by its `ColumnMetaData`."""
    offsets = [meta[number].value for number in (9, 10, 11) if number in meta]
    return min(int(offset) for offset in offsets if offset > 0)


def copied(entry: Struct, data: bytes) -> Chunk:
    """A raw chunk; indexes and Bloom filters, which lie elsewhere in the file, are left out."""
    meta: Struct = entry[3].value
    start = start_of(meta)
    new = {number: value for number, value in meta.items() if number not in (14, 15)}
    for number in (9, 10, 11):
        if number in new and new[number].value > 0:
            new[number] = i64(new[number].value - start)
        else:
            new.pop(number, None)
    return Chunk(parts=[data], entry={2: i64(0), 3: entry[3]._replace(value=new)})


def moved(entry: Struct, position: int) -> Struct:
    """The entry of a chunk that begins at `position`."""
    meta = dict(entry[3].value)
    for number in (9, 10, 11):
        if number in meta:
            meta[number] = i64(meta[number].value + position)
    return {**entry, 3: entry[3]._replace(value=meta)}


def encoded(table: pa.Table, compression: str | None) -> list[Chunk]:
    """The chunks of a table, encoded by pyarrow as one row group."""
    data, footer = _written(table.schema, table, compression)
    (group,) = footer[4].value.values
    chunks = []
    for entry in group[1].value.values:
        meta = entry[3].value
        start = start_of(meta)
        chunks.append(copied(entry, data[start : start + meta[7].value]))
    return chunks


def elements_of(schema: pa.Schema) -> list[Struct]:
    """The elements of a Parquet schema, without its root."""
    _, footer = _written(schema, None, None)
    elements: list[Struct] = footer[2].value.values
    return elements[1:]


def _written(schema: pa.Schema, table: pa.Table | None, compression: str | None) -> tuple[bytes, Struct]:
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
    return data, read_struct(data, len(data) - 8 - length)[0]
