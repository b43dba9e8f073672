"""Some column chunks of one field as a Parquet file in memory, for pyarrow to decode."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_cce.jobs.remap.parquet.chunks import Chunk
from torchrec_cce.jobs.remap.parquet.footer import ARROW_SCHEMA, FieldPlan, key_value
from torchrec_cce.jobs.remap.parquet.metadata import MAGIC, FileMetaData, RowGroup, SchemaElement
from torchrec_cce.jobs.remap.parquet.recoder import Bytes
from torchrec_cce.jobs.remap.parquet.thrift import LIST, STRUCT, Items, write_struct

Group: TypeAlias = tuple[Sequence[Chunk], int]
"""The chunks of a field in a row group, and its rows."""

_LARGE_BYTES = 1 << 20
_PENDING_BYTES = 16 << 20
_PENDING_CHUNKS = 10_000
_BATCH_ROWS = 1 << 16


def decoded(plan: FieldPlan, group: Group) -> pa.ChunkedArray:
    """The rows of a raw field in one row group, with the type that the field has in its file's schema."""
    table = _excerpt(plan, [group]).read(use_threads=False)
    _check_rows(plan, len(table), [group])
    return table.column(0)


def is_large(chunks: Sequence[Chunk]) -> bool:
    """Whether so many bytes are worth a file of their own."""
    return sum(chunk.num_bytes for chunk in chunks) >= _LARGE_BYTES


def prove(plan: FieldPlan, groups: Sequence[Group]) -> None:
    """Decode copied chunks, a few rows at a time. Raises ValueError if another reader could not."""
    try:
        batches = _excerpt(plan, groups).iter_batches(_BATCH_ROWS, use_threads=False)
        num_rows = sum(batch.num_rows for batch in batches)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"column {plan.name!r}: {error}") from error
    _check_rows(plan, num_rows, groups)


@dataclass
class SmallChunks:
    """Copied chunks that are not large, gathered until it is worth decoding them."""

    _pending: dict[int, tuple[FieldPlan, list[Group]]] = field(default_factory=dict)
    _num_bytes: int = 0
    _num_chunks: int = 0

    def add(self, plan: FieldPlan, group: Group) -> None:
        """Prove them, now or later. Raises as `prove`."""
        chunks, _ = group
        self._pending.setdefault(plan.leaves.start, (plan, []))[1].append(group)
        self._num_bytes += sum(chunk.num_bytes for chunk in chunks)
        self._num_chunks += len(chunks)
        if self._num_bytes >= _PENDING_BYTES or self._num_chunks >= _PENDING_CHUNKS:
            self.finish()

    def finish(self) -> None:
        """Prove those that were added. Raises as `prove`."""
        pending, self._pending = self._pending, {}
        self._num_bytes = self._num_chunks = 0
        for plan, groups in pending.values():
            prove(plan, groups)


def _excerpt(plan: FieldPlan, groups: Sequence[Group]) -> pq.ParquetFile:
    parts: list[Bytes] = [MAGIC]
    position, row_groups = len(MAGIC), []
    for chunks, num_rows in groups:
        entries, uncompressed = [], 0
        for chunk in chunks:
            entries.append(chunk.entry_at(position))
            uncompressed += chunk.uncompressed_bytes
            position += chunk.num_bytes
            parts += chunk.parts
        group = RowGroup({RowGroup.COLUMNS: (LIST, Items(STRUCT, entries))})
        group.num_rows, group.total_byte_size = num_rows, uncompressed
        row_groups.append(group)
    root = SchemaElement()
    root.name, root.num_children = b"schema", 1
    footer = FileMetaData()
    footer.version, footer.num_rows = 1, sum(num_rows for _, num_rows in groups)
    footer.schema, footer.row_groups = [root, *plan.raw_elements], row_groups
    schema = pa.schema([plan.raw_field]).serialize().to_pybytes()
    footer.key_value_metadata = [key_value(ARROW_SCHEMA, base64.b64encode(schema))]
    tail = write_struct(footer)
    parts += [tail, len(tail).to_bytes(4, "little"), MAGIC]
    return pq.ParquetFile(pa.BufferReader(b"".join(parts)))


def _check_rows(plan: FieldPlan, found: int, groups: Sequence[Group]) -> None:
    expected = sum(num_rows for _, num_rows in groups)
    if found != expected:
        raise ValueError(f"column {plan.name!r}: its column chunks have {found} rows, not {expected}")
