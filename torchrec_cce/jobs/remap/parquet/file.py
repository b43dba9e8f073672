"""A Parquet file with pointers in place of raw IDs, column chunk by column chunk.

Columns that hold no IDs are copied byte for byte, so that nothing about them changes, whatever wrote them. The pages of
ID columns are rewritten (`pages.py`); what that does not cover, such as lists of IDs, pyarrow decodes and encodes.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_cce.errors import DataFileError
from torchrec_cce.jobs.remap.parquet.chunks import Chunk, copied, encoded, start_of
from torchrec_cce.jobs.remap.parquet.footer import FieldPlan, new_footer, new_group, plan_fields
from torchrec_cce.jobs.remap.parquet.metadata import ColumnChunk, FileMetaData
from torchrec_cce.jobs.remap.parquet.pages import CannotRewrite, rewrite_chunk
from torchrec_cce.jobs.remap.parquet.thrift import read_struct, write_struct
from torchrec_cce.jobs.remap.remapper import Remapper, UnseenCounts

MAGIC = b"PAR1"

Write = Callable[[Any], object]
RowsDone = Callable[[int, int], object]
"""Told how many rows of how many are written."""


class FileCounts(NamedTuple):
    """What was counted while a file was remapped."""

    num_rows: int
    unseen: UnseenCounts


def remap_parquet(
    file: pa.NativeFile,
    name: str,
    remapper: Remapper,
    write: Write,
    *,
    compression: str | None,
    num_threads: int,
    progress: RowsDone = lambda _, __: None,
) -> FileCounts:
    """Write the remapped file, front to back.

    Row groups stay as they are. Memory holds a few column chunks. The bytes do not depend on `num_threads`.

    Args:
        file: open for reading at any place.
        name: of the file, for messages.
        write: takes bytes.
        compression: of new columns, as pyarrow names codecs, or None.
        progress: called after each row group.

    Raises:
        DataFileError, InvalidIDError: see `Remapper`; or the file is no Parquet file.
    """
    return _File(file, name, remapper, compression).copy(write, num_threads, progress)


class _File:
    """The raw file, and what each of its fields becomes."""

    def __init__(self, file: pa.NativeFile, name: str, remapper: Remapper, compression: str | None) -> None:
        self._file = file
        self._name = name
        self._remapper = remapper
        self._compression = compression
        raw = pq.ParquetFile(file)
        self._metadata, schema = raw.metadata, raw.schema_arrow
        self._new_schema = remapper.schema(schema, name)
        size = file.size()
        length = int.from_bytes(file.read_at(4, size - 8), "little")
        self._footer, _ = read_struct(FileMetaData, file.read_at(length, size - 8 - length))
        self._groups = self._footer.row_groups
        self._plans = plan_fields(self._footer, schema, remapper, self._new_schema)

    def copy(self, write: Write, num_threads: int, progress: RowsDone) -> FileCounts:
        position = 0

        def put(data: Any) -> None:
            nonlocal position
            write(data)
            position += len(data)

        put(MAGIC)
        groups, rows, unseen = [], 0, UnseenCounts()
        counts = [group.num_rows for group in self._groups]
        tasks = [
            partial(self._chunks, plan, number, sum(counts[:number]))
            for number, count in enumerate(counts)
            if count
            for plan in self._plans
        ]
        results = _in_order(tasks, num_threads)
        for group, count in zip(self._groups, counts, strict=True):
            if not count:
                continue
            start, entries = position, []
            for _ in self._plans:
                chunks, counted = next(results)
                unseen.update(counted)
                for chunk in chunks:
                    entries.append(chunk.entry_at(position))
                    for part in chunk.parts:
                        put(part)
            groups.append(new_group(group, self._plans, entries, start))
            rows += count
            progress(rows, sum(counts))
        footer = write_struct(new_footer(self._footer, self._plans, self._new_schema, groups))
        for part in (footer, len(footer).to_bytes(4, "little"), MAGIC):
            put(part)
        return FileCounts(rows, unseen)

    def _chunks(self, plan: FieldPlan, group: int, first_row: int) -> tuple[list[Chunk], UnseenCounts]:
        """The new file's chunks of one field in one row group."""
        entries = self._groups[group].columns
        raw = [self._read(entries[leaf]) for leaf in plan.leaves] if plan.copied or plan.rewrites else []
        kept = [copied(entries[leaf], data) for leaf, data in zip(plan.leaves, raw, strict=True)] if plan.copied else []
        if not plan.features:
            return kept, UnseenCounts()
        if plan.rewrites:
            try:
                new, unseen = rewrite_chunk(raw[0], entries[plan.leaves.start].meta_data, plan, self._compression)
                return kept + new, unseen
            except CannotRewrite:
                pass  # a wrong ID, too, is found by its row
        new, unseen = self._decoded(plan, group, first_row)
        return kept + new, unseen

    def _decoded(self, plan: FieldPlan, group: int, first_row: int) -> tuple[list[Chunk], UnseenCounts]:
        """The chunks of a field's new columns, by way of its decoded rows."""
        table = pq.ParquetFile(self._file, metadata=self._metadata).read_row_group(
            group, columns=[plan.name], use_threads=False
        )
        array = table.column(0).combine_chunks()
        unseen = UnseenCounts()
        arrays = self._remapper.columns(plan.name, array, self._name, first_row=first_row, unseen=unseen)
        names = plan.new_names
        fields = [self._new_schema.field(name) for name in names]
        return encoded(pa.table(arrays[-len(names) :], schema=pa.schema(fields)), self._compression), unseen

    def _read(self, entry: ColumnChunk) -> bytes:
        elsewhere = (entry.file_path, entry.crypto_metadata, entry.encrypted_column_metadata)
        if any(field is not None for field in elsewhere):
            raise DataFileError(f"{self._name}: has encrypted columns, or columns in other files; write it anew")
        size = entry.meta_data.total_compressed_size
        data: bytes = self._file.read_at(size, start_of(entry.meta_data))
        if len(data) != size:
            raise DataFileError(f"{self._name}: is cut short")
        return data


T = TypeVar("T")


def _in_order(calls: Sequence[Callable[[], T]], num_threads: int) -> Iterator[T]:
    """The results of `calls` in their order, few of them ahead: at most twice as many as threads."""
    if num_threads == 1:
        yield from (call() for call in calls)
        return
    left = iter(calls)
    with ThreadPoolExecutor(num_threads) as threads:
        ahead: list[Future[T]] = [threads.submit(call) for call in islice(left, 2 * num_threads)]
        try:
            while ahead:
                result = ahead.pop(0).result()
                ahead += [threads.submit(call) for call in islice(left, 1)]
                yield result
        finally:
            for future in ahead:
                future.cancel()
