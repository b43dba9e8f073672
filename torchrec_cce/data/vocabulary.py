"""The vocabulary of a log: the 64-bit IDs of its columns, counted, and numbered from the most frequent on."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from threading import Event, Lock
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_cce.data.arrow import check_columns, is_list, to_column
from torchrec_cce.data.files import PathLike, as_data_file_error
from torchrec_cce.data.key_counts import MIN_MEMORY_BYTES, KeyCounts
from torchrec_cce.data.parquet import parquet_files
from torchrec_cce.data.record_batches import Part
from torchrec_cce.errors import ConfigError
from torchrec_cce.maps.vocabulary import Vocabulary

_ARROW_SUFFIXES = (".arrow", ".arrows", ".feather")
_ARROW_FILE_MAGIC = b"ARROW1"  # a stream begins with something else
_MAX_ARROW_PARTS = 256  # of a file: opening it for each of many small record batches would cost more than reading them
_BATCH_ROWS = 1 << 16
_READ_BYTES = 1 << 20

_Ranked: TypeAlias = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""(keys, frequencies), both [m] int64."""


@dataclass(frozen=True, kw_only=True)
class VocabularyReport:
    """What became of the IDs of a log. An occurrence is one ID in one bag."""

    rows: int
    """Rows read, of all files."""
    occurrences: int
    """IDs read, of all columns."""
    nulls: int
    """Null cells and null lists, which hold no ID."""
    distinct: int
    """Different IDs among the occurrences."""
    kept: int
    """Different IDs in the vocabulary."""
    kept_occurrences: int
    """Occurrences of those."""
    rare: int
    """Different IDs left out because they occur less than `min_frequency` times."""
    rare_occurrences: int
    """Occurrences of those."""
    surplus: int
    """Different IDs left out because `max_size` others are more frequent."""
    surplus_occurrences: int
    """Occurrences of those."""
    seconds: float
    """From the first file to the finished vocabulary."""
    spilled_bytes: int
    """Written to temporary files because the memory was too small."""

    @property
    def coverage(self) -> float:
        """Share of the occurrences whose ID is in the vocabulary; 1 if there are none."""
        return self.kept_occurrences / self.occurrences if self.occurrences else 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class BuiltVocabulary:
    """A vocabulary, and what it was built from."""

    vocabulary: Vocabulary
    frequencies: npt.NDArray[np.int64]
    """[n] int64: how often the ID of each row occurs; never ascending."""
    report: VocabularyReport


def build_vocabulary(
    paths: PathLike | Sequence[PathLike],
    *,
    columns: Sequence[str],
    min_frequency: int = 1,
    max_size: int | None = None,
    memory_bytes: int = 1 << 30,
    num_threads: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> BuiltVocabulary:
    """Count the IDs of some columns and number them: the most frequent gets position 0, the smaller of equals comes
    first.

    So rows that are read often lie together. The result does not depend on the order of rows and files, on
    `memory_bytes`, nor on `num_threads`.

    Args:
        paths: Parquet files, folders (their `*.parquet`, also in folders below) and Arrow IPC files or streams
            (`.arrow`, `.arrows`, `.feather`), one or several.
        columns: ID columns that share this vocabulary: any integers (uint64 as two's complement), dictionary-encoded
            integers, or lists of them. A null and a null list hold no ID.
        min_frequency: leave out IDs that occur less often.
        max_size: keep no more than this many IDs, the first in the order above; None = all.
        memory_bytes: for counting, at least 2^20; what does not fit goes to temporary files (in `TMPDIR`). On top come
            some 10 MiB in each thread to read 65536 rows of a column at a time (an Arrow file by whole record batches),
            and 60 bytes for each ID that is kept.
        num_threads: that read and count; None = one a core.
        on_progress: called with the rows read so far, by one thread at a time.

    Raises:
        DataFileError: a file is missing or cannot be read, a column is missing or holds no integers, or a list holds a
            null.
        ConfigError: `columns` is empty or names one twice, `min_frequency < 1`, `max_size < 1`,
            `memory_bytes < 2^20` or `num_threads < 1`.
    """
    started = time.perf_counter()
    num_threads = (os.cpu_count() or 1) if num_threads is None else num_threads
    _check_arguments(columns, min_frequency, max_size, memory_bytes, num_threads)
    tally = _Tally(on_progress)
    files = parquet_files(paths)
    for path in files:  # all of them before the first is read, which may take hours
        check_columns(path, _schema(path), [], columns)
    with KeyCounts(memory_bytes=memory_bytes, num_threads=num_threads) as counts:
        readers = (reader for path in files for reader in _readers(path, columns))
        _read_all(readers, lambda part: _count(part, columns, counts, tally), num_threads)
        selection = _Selection(min_frequency, max_size)
        for keys, frequencies in counts.partitions():
            selection.add(keys, frequencies)
        spilled_bytes = counts.spilled_bytes
    keys, frequencies = selection.ranked()
    vocabulary = Vocabulary.build(keys, num_threads=num_threads)
    kept_occurrences = int(frequencies.sum())
    report = VocabularyReport(
        rows=tally.rows,
        occurrences=tally.occurrences,
        nulls=tally.nulls,
        distinct=selection.distinct,
        kept=len(keys),
        kept_occurrences=kept_occurrences,
        rare=selection.rare,
        rare_occurrences=selection.rare_occurrences,
        surplus=selection.distinct - selection.rare - len(keys),
        surplus_occurrences=tally.occurrences - selection.rare_occurrences - kept_occurrences,
        seconds=time.perf_counter() - started,
        spilled_bytes=spilled_bytes,
    )
    return BuiltVocabulary(vocabulary=vocabulary, frequencies=frequencies, report=report)


def _check_arguments(
    columns: Sequence[str], min_frequency: int, max_size: int | None, memory_bytes: int, num_threads: int
) -> None:
    if isinstance(columns, str) or not columns or len(set(columns)) < len(columns):
        raise ConfigError(f"columns={columns!r} must be a list of at least one name, each once")
    for name, value, least in (
        ("min_frequency", min_frequency, 1),
        ("max_size", max_size, 1),
        ("memory_bytes", memory_bytes, MIN_MEMORY_BYTES),
        ("num_threads", num_threads, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{name}={value} must be at least {least}")


class _Tally:
    """Sums over all threads."""

    def __init__(self, on_progress: Callable[[int], None] | None) -> None:
        self.rows = self.occurrences = self.nulls = 0
        self._on_progress = on_progress
        self._lock = Lock()

    def add(self, *, rows: int, occurrences: int, nulls: int) -> None:
        with self._lock:
            self.rows += rows
            self.occurrences += occurrences
            self.nulls += nulls
            if self._on_progress is not None:
                self._on_progress(self.rows)


class _Selection:
    """The counted keys that are frequent enough, never many more than there is room for."""

    def __init__(self, min_frequency: int, max_size: int | None) -> None:
        self._min_frequency = min_frequency
        self._max_size = max_size
        self._parts: list[_Ranked] = []
        self._held = 0
        self.distinct = self.rare = self.rare_occurrences = 0

    def add(self, keys: npt.NDArray[np.int64], frequencies: npt.NDArray[np.int64]) -> None:
        frequent = frequencies >= self._min_frequency
        self.distinct += len(keys)
        self.rare += len(keys) - int(frequent.sum())
        self.rare_occurrences += int(frequencies[~frequent].sum())
        self._parts.append((keys[frequent], frequencies[frequent]))
        self._held += len(self._parts[-1][0])
        # Only when there are twice as many as may stay, so that all sorting together stays near linear.
        if self._max_size is not None and self._held > 2 * self._max_size:
            self._parts = [self.ranked()]
            self._held = len(self._parts[0][0])

    def ranked(self) -> _Ranked:
        """Those that stay: by descending frequency, then by ascending key."""
        keys = np.concatenate([part[0] for part in self._parts])
        frequencies = np.concatenate([part[1] for part in self._parts])
        self._parts = []
        order = np.argsort(-frequencies)
        keys, frequencies = keys[order], frequencies[order]
        # Keys alone are sorted within each frequency: several times faster than to sort by both.
        starts = [0, *(np.flatnonzero(np.diff(frequencies)) + 1).tolist(), len(keys)]
        for start, stop in pairwise(starts):
            keys[start:stop].sort()
        # Copies, since a slice would keep what is left out in memory.
        return keys[: self._max_size].copy(), frequencies[: self._max_size].copy()


_Reader: TypeAlias = Callable[[], Iterator[Part]]
"""Reads what one thread takes at a time: a row group, a range of record batches, or a whole stream."""


def _read_all(readers: Iterator[_Reader], consume: Callable[[Part], None], num_threads: int) -> None:
    """Call `consume` with every part that `readers` read, in threads; the first error stops them all and is raised."""
    lock, stopped = Lock(), Event()

    def run() -> None:
        try:
            while not stopped.is_set():
                with lock:
                    reader = next(readers, None)
                if reader is None:
                    return
                for part in reader():
                    if stopped.is_set():
                        return
                    consume(part)
        except BaseException:
            stopped.set()
            raise

    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for future in [pool.submit(run) for _ in range(num_threads)]:
                future.result()
        finally:
            stopped.set()


def _count(part: Part, columns: Sequence[str], counts: KeyCounts, tally: _Tally) -> None:
    occurrences = nulls = 0
    for name in columns:
        column = part.column(name, to_column)
        counts.add(column.values)
        occurrences += len(column.values)
        raw = part.batch.column(name)
        # A null ID may lie in the dictionary, where the array does not count it; a null in a list is refused.
        nulls += raw.null_count if is_list(raw.type) else len(raw) - len(column.values)
    tally.add(rows=part.batch.num_rows, occurrences=occurrences, nulls=nulls)


def _readers(path: Path, columns: Sequence[str]) -> Iterator[_Reader]:
    """Those of one file."""
    if not _is_arrow(path):
        with _reading(path):
            metadata = pq.read_metadata(path)
        row = 0
        for group in range(metadata.num_row_groups):
            yield partial(_row_group, path, metadata, group, row, columns)
            row += metadata.row_group(group).num_rows
    elif _is_stream(path):
        yield partial(_arrow, path, columns)
    else:
        with _reading(path), pa.ipc.open_file(str(path)) as reader:
            size = reader.num_record_batches
        step = -(-size // _MAX_ARROW_PARTS) or 1
        for start in range(0, size, step):
            yield partial(_arrow, path, columns, range(start, min(start + step, size)))


def _row_group(path: Path, metadata: pq.FileMetaData, group: int, row: int, columns: Sequence[str]) -> Iterator[Part]:
    # Buffered, so that a column chunk is read piece by piece, however large it is.
    with (
        _reading(path),
        pq.ParquetFile(path, metadata=metadata, buffer_size=_READ_BYTES, pre_buffer=False) as file,
    ):
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=list(columns), use_threads=False):
            yield Part(path=path, batch=batch, row=row)
            row += batch.num_rows


def _arrow(path: Path, columns: Sequence[str], numbers: range | None = None) -> Iterator[Part]:
    """The record batches of these numbers in a file, or all of a stream."""
    fields = [_schema(path).get_field_index(name) for name in columns]
    options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
    opened = pa.ipc.open_stream if numbers is None else pa.ipc.open_file
    row = 0
    with _reading(path), pa.OSFile(str(path)) as source, opened(source, options=options) as reader:
        if numbers is not None:
            for number in numbers:
                yield Part(path=path, batch=reader.get_batch(number), row=0, record_batch=number)
            return
        for batch in reader:
            yield Part(path=path, batch=batch, row=row)
            row += batch.num_rows


def _is_arrow(path: Path) -> bool:
    return path.suffix in _ARROW_SUFFIXES


def _reading(path: Path) -> AbstractContextManager[None]:
    return as_data_file_error(path, "Arrow IPC" if _is_arrow(path) else "Parquet")


def _is_stream(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(_ARROW_FILE_MAGIC)) != _ARROW_FILE_MAGIC


def _schema(path: Path) -> pa.Schema:
    with _reading(path):
        if not _is_arrow(path):
            return pq.read_schema(path)
        with pa.OSFile(str(path)) as source:
            return (pa.ipc.open_stream(source) if _is_stream(path) else pa.ipc.open_file(source)).schema
