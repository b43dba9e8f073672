"""A Parquet file with pointers in place of raw IDs, column chunk by column chunk.

Columns that hold no IDs are copied byte for byte, so that nothing about them changes, whatever wrote them. The pages of
ID columns are rewritten (`pages.py`); what that does not cover, such as lists of IDs, pyarrow decodes and encodes.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import accumulate, islice
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_cce.errors import DataFileError
from torchrec_cce.jobs.remap.parquet.chunks import Chunk, copied, encoded
from torchrec_cce.jobs.remap.parquet.excerpt import SmallChunks, decoded, is_large, prove
from torchrec_cce.jobs.remap.parquet.footer import (
    FieldPlan,
    check_footer,
    new_footer,
    new_group,
    plan_fields,
    read_footer,
)
from torchrec_cce.jobs.remap.parquet.metadata import MAGIC, ColumnChunk
from torchrec_cce.jobs.remap.parquet.page import RawChunk, read_chunk
from torchrec_cce.jobs.remap.parquet.pages import CannotRewrite, rewrite_chunk
from torchrec_cce.jobs.remap.parquet.thrift import write_struct
from torchrec_cce.jobs.remap.remapper import Remapper, UnseenCounts

_SMALL_BYTES = 1 << 12
"""Of a part that is written together with others."""

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
        self._footer, self._stop = read_footer(file)
        schema = pq.ParquetFile(file).schema_arrow
        self._new_schema = remapper.schema(schema, name)
        self._groups = self._footer.row_groups
        self._plans = plan_fields(self._footer, schema, remapper, self._new_schema)
        if sum(group.num_rows for group in self._groups) != self._footer.num_rows:
            raise ValueError(f"its row groups do not have its {self._footer.num_rows} rows")

    def copy(self, write: Write, num_threads: int, progress: RowsDone) -> FileCounts:
        position = 0
        waiting: list[Any] = []

        def put(data: Any) -> None:
            nonlocal position
            position += len(data)
            waiting.append(data)
            if len(data) >= _SMALL_BYTES:
                flush()

        def flush() -> None:
            # Many small parts take longer on their way, one by one, than to be joined.
            is_small = len(waiting[-1]) < _SMALL_BYTES
            for data in [b"".join(waiting)] if is_small else [b"".join(waiting[:-1]), waiting[-1]]:
                write(data)
            waiting.clear()

        put(MAGIC)
        flush()
        groups, unseen = [], UnseenCounts()
        filled = [(number, group) for number, group in enumerate(self._groups) if group.num_rows]
        first_rows = [0, *accumulate(group.num_rows for _, group in filled)]
        tasks = (
            partial(self._chunks, plan, number, first_row)
            for (number, _), first_row in zip(filled, first_rows, strict=False)
            for plan in self._plans
        )
        results = _in_order(tasks, num_threads)
        small = SmallChunks()
        for (_, group), rows in zip(filled, first_rows[1:], strict=True):
            start, entries, uncompressed = position, [], 0
            for plan in self._plans:
                chunks, counted = next(results)
                unseen.update(counted)
                kept = chunks[: len(plan.leaves)]
                if plan.copied and not is_large(kept):
                    small.add(plan, (kept, group.num_rows))
                for chunk in chunks:
                    entries.append(chunk.entry_at(position))
                    uncompressed += chunk.uncompressed_bytes
                    for part in chunk.parts:
                        put(part)
            size = position - start
            if waiting:
                flush()
            groups.append(new_group(group, self._plans, entries, start=start, size=size, uncompressed=uncompressed))
            progress(rows, first_rows[-1])
        small.finish()
        footer = write_struct(new_footer(self._footer, self._plans, self._new_schema, groups))
        check_footer(footer, self._new_schema, first_rows[-1])
        for part in (footer, len(footer).to_bytes(4, "little"), MAGIC):
            put(part)
        flush()
        return FileCounts(first_rows[-1], unseen)

    def _chunks(self, plan: FieldPlan, number: int, first_row: int) -> tuple[list[Chunk], UnseenCounts]:
        """The new file's chunks of one field in one row group."""
        group = self._groups[number]
        raw = [
            self._read(group.columns[leaf], kind, group.num_rows, repeated=plan.repeated)
            for leaf, kind in zip(plan.leaves, plan.types, strict=True)
        ]
        chunks = [copied(chunk) for chunk in raw]
        kept = chunks if plan.copied else []
        if is_large(kept):
            prove(plan, [(kept, group.num_rows)])
        if not plan.features:
            return kept, UnseenCounts()
        if plan.rewrites:
            try:
                new, unseen = rewrite_chunk(raw[0], plan, self._compression)
                return kept + new, unseen
            except CannotRewrite:
                pass  # a wrong ID, too, is found by its row
        array = decoded(plan, (chunks, group.num_rows)).combine_chunks()
        unseen = UnseenCounts()
        arrays = self._remapper.columns(plan.name, array, self._name, first_row=first_row, unseen=unseen)
        names = plan.new_names
        fields = [self._new_schema.field(name) for name in names]
        new = encoded(pa.table(arrays[-len(names) :], schema=pa.schema(fields)), self._compression)
        return kept + new, unseen

    def _read(self, entry: ColumnChunk, kind: int | None, num_rows: int, *, repeated: bool) -> RawChunk:
        elsewhere = (entry.file_path, entry.crypto_metadata, entry.encrypted_column_metadata)
        if any(field is not None for field in elsewhere):
            raise DataFileError(f"{self._name}: has encrypted columns, or columns in other files; write it anew")
        count = entry.meta_data.num_values
        if entry.meta_data.type != kind:
            raise ValueError(f"a column chunk has the type {entry.meta_data.type}, its schema {kind}")
        if count < num_rows or (count > num_rows and not repeated):
            raise ValueError(f"a column chunk has {count} values for {num_rows} rows")
        return read_chunk(self._bytes, entry.meta_data)

    def _bytes(self, size: int, start: int) -> bytes:
        if size < 0 or not len(MAGIC) <= start <= self._stop - size:
            raise ValueError(f"a column chunk of {size} bytes from byte {start} on does not lie in the file")
        data: bytes = self._file.read_at(size, start)
        if len(data) != size:
            raise ValueError("it is cut short")
        return data


T = TypeVar("T")


def _in_order(calls: Iterable[Callable[[], T]], num_threads: int) -> Iterator[T]:
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
