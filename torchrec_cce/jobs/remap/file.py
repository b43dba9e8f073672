"""One raw file and the file that it becomes: what a worker of a remap does."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_cce.data.remapped_format import RemappedFormat
from torchrec_cce.errors import DataFileError, RegistryError
from torchrec_cce.jobs.remap.check import check_file
from torchrec_cce.jobs.remap.input import InputFile, reading, stat_input
from torchrec_cce.jobs.remap.output import Compression, FileFormat, FinishedFile, OutputFolder
from torchrec_cce.jobs.remap.parquet.file import FileCounts, RowsDone, remap_parquet
from torchrec_cce.jobs.remap.remapper import Remapper, UnseenCounts
from torchrec_cce.maps.arrow_file import ArrowOutput
from torchrec_cce.maps.registry import MapVersion, Registry
from torchrec_cce.maps.store import Store, open_store
from torchrec_cce.workers.engine import Counters

PARQUET_CODECS: dict[Compression, str | None] = {
    "zstd": "zstd",
    "lz4": "lz4_raw",
    "snappy": "snappy",
    "gzip": "gzip",
    "none": None,
}
"""Compression → pyarrow's name of it."""
ARROW_CODECS: dict[Compression, str | None] = {"zstd": "zstd", "lz4": "lz4", "none": None}


@dataclass(frozen=True, kw_only=True)
class FileTask:
    """What a worker must know to remap one file; it knows nothing else."""

    registry: str
    options: dict[str, Any] = field(repr=False)
    folder: str
    output: str
    remapped: RemappedFormat
    file_format: FileFormat
    compression: Compression
    file: InputFile
    output_name: str
    token: str
    """Of the output folder's lock."""
    num_threads: int
    inverse_check: bool
    number: int
    """Of the task in its job."""
    counters: Counters
    """From `2 · number` on: rows that are written, and the bytes of input that they come from."""

    def __str__(self) -> str:
        return f"{self.folder}/{self.file.name}"

    def progress(self, rows: int, of: int) -> None:
        """Tell the job how many rows of how many are written."""
        self.counters.set(2 * self.number, rows, self.file.num_bytes * rows // max(1, of))


def remap_file(task: FileTask) -> tuple[FinishedFile, int]:
    """Write the file and its record, and on demand check it: that many rows of it. Raises what `remap` does."""
    source, out = open_store(task.folder, **task.options), open_store(task.output, **task.options)
    opened = open_version(task.registry, task.remapped.version, task.options)
    if opened.entry.manifest_sha256 != task.remapped.manifest_sha256:
        raise RegistryError(
            f"{task.registry}: its {opened.identity} is not the version of that number with which this job began "
            f"(manifest {task.remapped.manifest_sha256[:12]}); remap to a new folder"
        )
    remapper = Remapper(
        format=task.remapped,
        maps={feature.table: opened.tables[feature.table].pointer_map for feature in task.remapped.features.values()},
    )
    folder = OutputFolder(out)
    with folder.at_work():
        _check_unchanged(task, source)
        num_bytes, digest = 0, sha256()
        with folder.file(task.output_name) as write:

            def counted(data: Any) -> None:
                nonlocal num_bytes
                write(data)
                digest.update(data)
                num_bytes += len(data)

            is_parquet = task.file_format == "parquet"
            with reading(str(task)), source.open_file(task.file.name) as file:
                counts = (remap_parquet if is_parquet else remap_to_arrow)(
                    file,
                    str(task),
                    remapper,
                    counted,
                    compression=(PARQUET_CODECS if is_parquet else ARROW_CODECS)[task.compression],
                    num_threads=task.num_threads,
                    progress=task.progress,
                )
            _check_unchanged(task, source)
        checked = 0
        if task.inverse_check:
            checked = check_file(source, task.file.name, out, task.output_name, remapper)
        finished = FinishedFile(
            input=task.file.name,
            name=task.output_name,
            num_rows=counts.num_rows,
            num_bytes=num_bytes,
            sha256=digest.hexdigest(),
            unseen=dict(sorted((+counts.unseen).items())),
        )
        folder.record(finished, task.token)
    return finished, checked


_OPENED: dict[tuple[str, int], MapVersion] = {}


def open_version(registry: str, version: int | None, options: Mapping[str, Any]) -> MapVersion:
    """A version, opened once in each process."""
    found = None if version is None else _OPENED.get((registry, version))
    if found is None:
        found = Registry(registry, **options).open(version)
        _OPENED[registry, found.version] = found
    return found


def _check_unchanged(task: FileTask, source: Store) -> None:
    now = stat_input(source, task.file.name)
    if now != task.file:
        what = "has gone" if now is None else "has changed"
        raise DataFileError(f"{task}: {what} since the job began; remap the new data to a new folder")


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
    """Write the remapped file as Arrow IPC, front to back: a record batch for each row group, one in memory at a time.

    Arguments and errors: as `remap_parquet`; `compression` is lz4, zstd or None.
    """
    raw = pq.ParquetFile(file, page_checksum_verification=True)
    schema = remapper.schema(raw.schema_arrow, name)
    options = pa.ipc.IpcWriteOptions(compression=compression, use_threads=num_threads > 1)
    row, unseen = 0, UnseenCounts()
    with (
        _arrow_threads(num_threads),
        pa.ipc.new_file(pa.PythonFile(ArrowOutput(write), mode="w"), schema, options=options) as writer,
    ):
        for group in range(raw.num_row_groups):
            table = raw.read_row_group(group, use_threads=num_threads > 1)
            if len(table) != (expected := raw.metadata.row_group(group).num_rows):
                raise ValueError(f"a row group has {len(table)} rows, not {expected}")
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
