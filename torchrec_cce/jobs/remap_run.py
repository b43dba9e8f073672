"""Remap stored data: raw IDs in Parquet files become index pointers of a published version, file by file."""

import struct
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_cce.data.remapped_format import (
    HELPER_POLICIES,
    LAYOUTS,
    HelperPolicy,
    Layout,
    RemappedFormat,
    feature_key,
    remapped_feature,
)
from torchrec_cce.errors import CCEError, ConfigError, DataFileError, RegistryError
from torchrec_cce.jobs.engine import EngineName, engine_of
from torchrec_cce.jobs.remap import Remapper
from torchrec_cce.jobs.remap_arrow import remap_to_arrow
from torchrec_cce.jobs.remap_check import check_file
from torchrec_cce.jobs.remap_folder import (
    COMPRESSIONS,
    FILE_FORMATS,
    Compression,
    FileFormat,
    FinishedFile,
    OutputFolder,
    RemapJob,
)
from torchrec_cce.jobs.remap_input import InputFile, list_input, stat_input
from torchrec_cce.jobs.remap_parquet import remap_parquet
from torchrec_cce.maps.registry import MapVersion, Registry
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.maps.storage import Storage

_PARQUET_CODECS: dict[Compression, str | None] = {
    "zstd": "zstd",
    "lz4": "lz4_raw",
    "snappy": "snappy",
    "gzip": "gzip",
    "none": None,
}
_ARROW_CODECS: dict[Compression, str | None] = {"zstd": "zstd", "lz4": "lz4", "none": None}


@dataclass(frozen=True, kw_only=True)
class RemapReport:
    """What a job did."""

    version: int
    num_files: int
    """Of the whole output."""
    num_rows: int
    num_bytes: int
    skipped_files: int
    """Finished by an earlier process."""
    input_bytes: int
    checked_rows: int
    """Rows read back and proved by the inverse check; 0 without it."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a job is, after each file."""

    done_files: int
    num_files: int
    done_bytes: int
    """Of input, without what an earlier process did."""
    num_bytes: int
    rows: int
    """Done by this process."""


def remap(
    input: str,
    output: str,
    *,
    registry: str,
    version: int | None = None,
    features: Mapping[str, str] | None = None,
    layout: Layout = "words",
    helper: HelperPolicy = "drop",
    file_format: FileFormat = "parquet",
    compression: Compression = "zstd",
    engine: EngineName = "local",
    num_workers: int | None = None,
    inverse_check: bool = False,
    options: Mapping[str, Any] | None = None,
    progress: Callable[[Progress], object] = lambda _: None,
) -> RemapReport:
    """Write files in which raw IDs are replaced by index pointers; everything else is as in the raw files.

    Files appear whole or not at all, in the input's relative paths, with its rows and row groups. A job that was ended
    goes on where it was when it is run again; the output does not depend on where it was ended, on the engine or on
    the number of workers.

    Args:
        input: Parquet: a file, a folder with all below it, or a glob; see `list_input`.
        output: a folder, on a disk or in an object store: new, or of this job.
        registry, version: the maps; None is the current version.
        features: feature → its raw column; by default all of the version's features that are columns of the first file.
        layout, helper: see `torchrec_cce.data.remapped_format`.
        file_format, compression: of the output. Parquet columns that are not remapped keep the compression they have.
        engine, num_workers: see `engine_of`. Where there are fewer files than workers, each uses several threads.
        inverse_check: read back a random sample of every file and prove it against map and input.
        options: of the object stores, see `Storage`.
        progress: called after each file.

    Raises:
        ConfigError: an unknown option, or a feature that the version does not have.
        DataFileError: a file that cannot be read, is not as described, or has changed since the job began.
        InvalidIDError: an ID that its map does not know under `unseen="error"`.
        JobError: the output cannot be written or is another job's, or a worker vanished. What is finished stays.
        RegistryError: a registry or a store that does not answer.
    """
    for name, value, allowed in (
        ("layout", layout, LAYOUTS),
        ("helper", helper, HELPER_POLICIES),
        ("format", file_format, FILE_FORMATS),
        ("compression", compression, COMPRESSIONS if file_format == "parquet" else tuple(_ARROW_CODECS)),
    ):
        if value not in allowed:
            raise ConfigError(f"{name}={value!r} is not one of {', '.join(allowed)}")
    began = time.monotonic()
    options = dict(options or {})
    opened = _open(registry, version, options)
    folder, files = list_input(input, options)
    out = Storage(output, **options)
    one_file = input.rstrip("/") in (files[0].name, f"{folder}/{files[0].name}")
    url = Storage(folder, **options).url
    _check_apart(f"{url}/{files[0].name}" if one_file else url, out.url)
    job = RemapJob(
        input=Storage(folder, **options).url,
        files=tuple(files),
        file_format=file_format,
        compression=compression,
        remapped=_remapped_format(opened, folder, files[0], features, layout, helper, options),
    )
    for file in files:
        _check_hive_keys(folder, file, job.remapped)
    output_folder = OutputFolder(out)
    with output_folder.begun(job) as finished, engine_of(engine, num_workers=num_workers) as workers:
        done = dict(finished)
        todo = sorted((one for one in files if one.name not in done), key=lambda one: -one.num_bytes)
        total = sum(one.num_bytes for one in todo)
        tasks = [
            _FileTask(
                registry=registry,
                options=options,
                folder=folder,
                output=output,
                job=_Settings(remapped=job.remapped, file_format=file_format, compression=compression),
                file=one,
                output_name=job.output_name(one),
                num_threads=max(1, round(workers.num_workers * one.num_bytes / max(1, total))),
                inverse_check=inverse_check,
            )
            for one in todo
        ]
        rows = done_bytes = checked = 0
        for task, result in workers.run(_remap_file, tasks):
            done[task.file.name] = result.finished
            rows += result.finished.num_rows
            checked += result.checked_rows
            done_bytes += task.file.num_bytes
            progress(
                Progress(done_files=len(done), num_files=len(files), done_bytes=done_bytes, num_bytes=total, rows=rows)
            )
        manifest = output_folder.complete(job, list(done.values()))
    return RemapReport(
        version=opened.version,
        num_files=len(files),
        num_rows=manifest.num_rows,
        num_bytes=manifest.num_bytes,
        skipped_files=len(finished),
        input_bytes=sum(one.num_bytes for one in files),
        checked_rows=checked,
        seconds=time.monotonic() - began,
    )


@dataclass(frozen=True, kw_only=True)
class _Settings:
    remapped: RemappedFormat
    file_format: FileFormat
    compression: Compression


@dataclass(frozen=True, kw_only=True)
class _FileTask:
    """One file, for a worker that knows nothing else."""

    registry: str
    options: dict[str, Any] = field(repr=False)
    folder: str
    output: str
    job: _Settings
    file: InputFile
    output_name: str
    num_threads: int
    inverse_check: bool

    def __str__(self) -> str:
        return f"{self.folder}/{self.file.name}"


@dataclass(frozen=True, kw_only=True)
class _Result:
    finished: FinishedFile
    checked_rows: int


def _remap_file(task: _FileTask) -> _Result:
    """In a worker: one file, its record, and on demand its check."""
    source, out = Storage(task.folder, **task.options), Storage(task.output, **task.options)
    remapped = task.job.remapped
    opened = _open(task.registry, remapped.version, task.options)
    if opened.entry.manifest_sha256 != remapped.manifest_sha256:
        raise RegistryError(
            f"{task.registry}: its {opened.identity} is not the version of that number with which this job began "
            f"(manifest {remapped.manifest_sha256[:12]}); remap to a new folder"
        )
    remapper = Remapper(
        format=remapped, maps={one.table: opened.tables[one.table].pointer_map for one in remapped.features.values()}
    )
    folder = OutputFolder(out)
    with folder.at_work():
        _check_unchanged(task, source)
        num_bytes = 0
        with folder.file(task.output_name) as write:

            def counted(data: Any) -> None:
                nonlocal num_bytes
                write(data)
                num_bytes += len(data)

            with _reading(str(task)), source.open_file(task.file.name) as file:
                compression, num_threads = task.job.compression, task.num_threads
                if task.job.file_format == "parquet":
                    codec = _PARQUET_CODECS[compression]
                    rows = remap_parquet(file, str(task), remapper, counted, compression=codec, num_threads=num_threads)
                else:
                    codec = _ARROW_CODECS[compression]
                    rows = remap_to_arrow(
                        file, str(task), remapper, counted, compression=codec, num_threads=num_threads
                    )
            _check_unchanged(task, source)
        checked = 0
        if task.inverse_check:
            checked = check_file(source, task.file.name, out, task.output_name, remapper)
        finished = FinishedFile(input=task.file.name, name=task.output_name, num_rows=rows, num_bytes=num_bytes)
        folder.record(finished)
    return _Result(finished=finished, checked_rows=checked)


_OPENED: dict[tuple[str, int], MapVersion] = {}


def _open(registry: str, version: int | None, options: Mapping[str, Any]) -> MapVersion:
    """A version, opened once in each process."""
    found = None if version is None else _OPENED.get((registry, version))
    if found is None:
        found = Registry(registry, **options).open(version)
        _OPENED[registry, found.version] = found
    return found


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """What goes wrong while a raw file is read, as a DataFileError of one line."""
    try:
        yield
    except CCEError:
        raise
    except FileNotFoundError as error:
        raise DataFileError(f"{name}: no such file; it has gone since the job began") from error
    except (pa.ArrowException, OSError, ValueError, IndexError, KeyError, struct.error) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataFileError(f"{name}: cannot be read as Parquet ({reason})") from error


def _check_unchanged(task: _FileTask, source: Storage) -> None:
    now = stat_input(source, task.file.name)
    if now != task.file:
        what = "has gone" if now is None else "has changed"
        raise DataFileError(f"{task}: {what} since the job began; remap the new data to a new folder")


def _remapped_format(
    opened: MapVersion,
    folder: str,
    file: InputFile,
    features: Mapping[str, str] | None,
    layout: Layout,
    helper: HelperPolicy,
    options: Mapping[str, Any],
) -> RemappedFormat:
    """What this job writes, with the features that are asked for, or those that a file has."""
    tables_of: dict[str, list[str]] = {}
    for table, snapshot in opened.tables.items():
        for feature in snapshot.feature_names:
            tables_of.setdefault(feature, []).append(table)
    if features is None:
        name = f"{folder}/{file.name}"
        with _reading(name), Storage(folder, **options).open_file(file.name) as raw:
            columns = {*pq.read_schema(raw).names, *file.hive_keys()}
        features = {feature: feature for feature in tables_of if feature in columns}
        if not features:
            raise DataFileError(
                f"{name}: no column has the name of a feature of {opened.identity}: {', '.join(tables_of)}; name the "
                "columns with --features feature=column"
            )
    unknown = [feature for feature in features if feature not in tables_of]
    if unknown:
        raise ConfigError(
            f"features {unknown} are not among those of {opened.identity}, which are {', '.join(tables_of)}"
        )
    for table in sorted({table for feature in features for table in tables_of[feature]}):
        if helper == "keep-raw" and opened.tables[table].pointer_map.unseen == "first_row":
            raise ConfigError(
                f"helper={helper!r}: raw IDs do not tell which of them the map of table {table!r} knows, and by its "
                "policy unseen='first_row' the others have the first row's helper; take store or drop"
            )
    return RemappedFormat(
        version=opened.version,
        manifest_sha256=opened.entry.manifest_sha256,
        layout=layout,
        helper=helper,
        features={
            feature_key(feature, table, shared=len(tables_of[feature]) > 1): remapped_feature(
                feature,
                table=table,
                column=column,
                layout=layout,
                helper=helper,
                shared=len(tables_of[feature]) > 1,
                **_sizes(opened.tables[table]),
            )
            for feature, column in features.items()
            for table in tables_of[feature]
        },
    )


def _sizes(table: TableSnapshot) -> dict[str, Any]:
    one = table.pointer_map
    return {"map_digest": one.digest, "num_columns": one.num_columns, "num_rows": one.num_rows}


def _check_hive_keys(folder: str, file: InputFile, remapped: RemappedFormat) -> None:
    keys = file.hive_keys()
    for one in remapped.features.values():
        if one.column in keys:
            raise DataFileError(
                f"{folder}/{file.name}: {one.column!r}, the column of feature {one.feature!r}, is a key of its "
                "folders, which are not remapped; write it as a column, or leave the feature out with --features"
            )


def _check_apart(folder: str, output: str) -> None:
    one, other = folder.rstrip("/") + "/", output.rstrip("/") + "/"
    if one.startswith(other) or other.startswith(one):
        raise ConfigError(f"output {output} and input {folder} lie in one another; choose a folder beside the input")
