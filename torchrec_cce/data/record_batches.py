"""Record batches of Parquet and Arrow IPC files, streamed as one log with only the columns that are needed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_cce.data.arrow import BadCell, to_dense, to_labels
from torchrec_cce.data.files import as_data_file_error
from torchrec_cce.errors import ConfigError, DataFileError

T = TypeVar("T")

_ARROW_MAGIC = b"ARROW1"


@dataclass(frozen=True, kw_only=True)
class Part:
    """Consecutive rows of one file."""

    path: Path
    row: int
    """Number of the first of them in the file, from 0, or in its record batch where that has a number."""
    batch: pa.RecordBatch
    record_batch: int | None = None

    def column(self, name: str, conversion: Callable[[pa.Array], T]) -> T:
        """What `conversion` makes of a column.

        Raises:
            DataFileError: it found a bad cell; the message says where.
        """
        with self.at(name):
            return conversion(self.batch.column(name))

    @contextmanager
    def at(self, name: str) -> Iterator[None]:
        """Turn a BadCell of a column into a DataFileError that says where."""
        try:
            yield
        except BadCell as error:
            within = "" if self.record_batch is None else f" of record batch {self.record_batch}"
            place = f"column {name!r}, row {self.row + error.row}{within} (the first is 0)"
            raise DataFileError(f"{self.path}: {place} {error}") from None

    def labels(self, name: str) -> npt.NDArray[np.float32]:
        """[N] float32: 0 and 1."""
        return self.column(name, to_labels)

    def dense(self, names: Sequence[str]) -> npt.NDArray[np.float32]:
        """[N, D] float32, finite."""
        matrix = np.empty((self.batch.num_rows, len(names)), dtype=np.float32)
        for position, name in enumerate(names):
            matrix[:, position] = self.column(name, to_dense)
        return matrix


def read_parts(
    files: Sequence[Path],
    columns_of: Callable[[Path, pa.Schema], Sequence[str]],
    *,
    skip_rows: int = 0,
    max_rows: int | None = None,
    chunk_rows: int,
) -> Iterator[Part]:
    """Stream files as one log.

    Args:
        columns_of: the columns to read of a file; raises DataFileError if its schema will not do.
        skip_rows: rows to pass over; whole files and row groups among them are not read.
        max_rows: rows to read after those; None = to the end.
        chunk_rows: the most rows in a part.

    Raises:
        DataFileError: while iterating; a file is neither Parquet nor Arrow IPC, or damaged.
        ConfigError: a negative `skip_rows` or `max_rows`, or `chunk_rows < 1`.
    """
    if skip_rows < 0 or chunk_rows < 1 or (max_rows is not None and max_rows < 0):
        raise ConfigError(
            f"skip_rows={skip_rows}, max_rows={max_rows}, chunk_rows={chunk_rows}: the first two must be at least 0, "
            "the last at least 1"
        )
    skip, left = skip_rows, max_rows
    for path in files:
        if left == 0:
            return
        with _opened(path) as file:
            columns = columns_of(path, file.schema)
            row, batches = file.batches(columns, skip, chunk_rows)
            skip -= row  # what is left to skip lies within the first batches
            for batch in batches:
                first = min(skip, batch.num_rows)
                batch, skip, row = batch.slice(first, left), skip - first, row + first
                if not batch.num_rows:
                    continue
                left = None if left is None else left - batch.num_rows
                yield Part(path=path, row=row, batch=batch)
                row += batch.num_rows
                if left == 0:
                    break


def read_schema(path: Path) -> pa.Schema:
    """The schema of a file. Raises DataFileError as `read_parts`."""
    with _opened(path) as file:
        return file.schema


class _ParquetFile:
    def __init__(self, file: pq.ParquetFile) -> None:
        self._file = file
        self.schema = file.schema_arrow

    def batches(self, columns: Sequence[str], skip: int, chunk_rows: int) -> tuple[int, Iterator[pa.RecordBatch]]:
        """How many of the first `skip` rows need not be read, and the batches after them."""
        metadata, number, row = self._file.metadata, 0, 0
        while number < metadata.num_row_groups:
            size = metadata.row_group(number).num_rows
            if row + size > skip:
                break
            number, row = number + 1, row + size
        groups = list(range(number, metadata.num_row_groups))
        return row, self._file.iter_batches(batch_size=chunk_rows, row_groups=groups, columns=list(columns))


class _ArrowFile:
    """Memory-mapped, so that what is not compressed is not copied."""

    def __init__(self, source: pa.MemoryMappedFile) -> None:
        self._source = source
        self.schema = pa.ipc.open_file(source).schema

    def batches(self, columns: Sequence[str], skip: int, chunk_rows: int) -> tuple[int, Iterator[pa.RecordBatch]]:
        """As `_ParquetFile.batches`."""
        # Only a column of a batch tells how long it is, so the first is read of batches that are skipped.
        lengths, whole = self._reader(columns[:1]), self._reader(columns)
        number = row = 0
        while skip > row and number < whole.num_record_batches:
            size = lengths.get_batch(number).num_rows
            if row + size > skip:
                break
            number, row = number + 1, row + size
        return row, self._read(whole, number, columns, chunk_rows)

    def _reader(self, columns: Sequence[str]) -> pa.ipc.RecordBatchFileReader:
        fields = [self.schema.get_field_index(name) for name in columns]
        return pa.ipc.open_file(self._source, options=pa.ipc.IpcReadOptions(included_fields=fields))

    @staticmethod
    def _read(
        reader: pa.ipc.RecordBatchFileReader, first: int, columns: Sequence[str], chunk_rows: int
    ) -> Iterator[pa.RecordBatch]:
        for number in range(first, reader.num_record_batches):
            batch = reader.get_batch(number).select(list(columns))
            batch.validate()
            for start in range(0, batch.num_rows, chunk_rows):
                yield batch.slice(start, chunk_rows)


@contextmanager
def _opened(path: Path) -> Iterator[_ParquetFile | _ArrowFile]:
    """A file of either kind, told apart by its first bytes."""
    with as_data_file_error(path, "a file"), path.open("rb") as file:
        is_arrow = file.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC
    if is_arrow:
        with as_data_file_error(path, "Arrow IPC"), pa.memory_map(str(path)) as source:
            yield _ArrowFile(source)
    else:
        with as_data_file_error(path, "Parquet"), pq.ParquetFile(path) as parquet:
            yield _ParquetFile(parquet)
