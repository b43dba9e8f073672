"""A Parquet file with pointers in place of raw IDs, as an Arrow IPC file: a record batch for each row group."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_cce.jobs.remap.parquet.file import FileCounts, RowsDone
from torchrec_cce.jobs.remap.remapper import Remapper, UnseenCounts


def remap_to_arrow(
    file: pa.NativeFile,
    name: str,
    remapper: Remapper,
    write: Callable[[Any], object],
    *,
    compression: str | None,
    num_threads: int,
    progress: RowsDone = lambda _, __: None,
) -> FileCounts:
    """Write the remapped file, front to back. Memory holds one row group.

    Arguments and errors: as `remap_parquet`; `compression` is lz4, zstd or None.
    """
    raw = pq.ParquetFile(file)
    schema = remapper.schema(raw.schema_arrow, name)
    options = pa.ipc.IpcWriteOptions(compression=compression, use_threads=num_threads > 1)
    row, unseen = 0, UnseenCounts()
    with (
        _arrow_threads(num_threads),
        pa.ipc.new_file(pa.PythonFile(_Sink(write), mode="w"), schema, options=options) as writer,
    ):
        for group in range(raw.num_row_groups):
            table = raw.read_row_group(group, use_threads=num_threads > 1)
            # One batch, unless a column of strings is too long for one array.
            for batch in table.combine_chunks().to_batches():
                writer.write_batch(remapper.batch(batch, name, first_row=row, unseen=unseen))
                row += len(batch)
            progress(row, raw.metadata.num_rows)
    return FileCounts(row, unseen)


@contextmanager
def _arrow_threads(count: int) -> Iterator[None]:
    """Let Arrow have so many threads for decoding and compressing; a worker leaves it one."""
    before = pa.cpu_count()
    pa.set_cpu_count(count)
    try:
        yield
    finally:
        pa.set_cpu_count(before)


class _Sink:
    """A function that takes bytes, as the file object that Arrow wants."""

    closed = False

    def __init__(self, write: Callable[[Any], object]) -> None:
        self._write = write
        self._position = 0

    def write(self, data: Any) -> int:
        self._write(data)
        self._position += len(data)
        return len(data)

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        """Nothing to do: every write goes through at once."""

    def close(self) -> None:
        self.closed = True
