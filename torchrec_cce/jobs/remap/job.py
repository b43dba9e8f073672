"""Remap stored data: raw IDs in Parquet files become index pointers of a published version, file by file."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from torchrec_cce.data.remapped_format import (
    HELPER_POLICIES,
    LAYOUTS,
    HelperPolicy,
    Layout,
    RemappedFormat,
    feature_key,
    format_of,
    remapped_feature,
)
from torchrec_cce.errors import ConfigError, DataFileError
from torchrec_cce.jobs.remap.file import ARROW_CODECS, FileTask, open_version, remap_file
from torchrec_cce.jobs.remap.input import InputFile, list_input, reading
from torchrec_cce.jobs.remap.output import COMPRESSIONS, FILE_FORMATS, Compression, FileFormat, OutputFolder, RemapJob
from torchrec_cce.maps.registry import MapVersion
from torchrec_cce.maps.store import open_store
from torchrec_cce.workers import EngineName, engine_of
from torchrec_cce.workers.engine import Counters


@dataclass(frozen=True, kw_only=True)
class RemapReport:
    """What a job did, and what its output holds."""

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
    unseen: Mapping[str, int]
    """Key of a feature in the format → how many IDs of the whole output's rows its map does not know: they have hashed
    pointers, or the first row's, as its policy says."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RemapProgress:
    """How far a job is."""

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
    progress: Callable[[RemapProgress], object] = lambda _: None,
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
        engine, num_workers: see `engine_of`. Where there are fewer files than workers, each uses several threads; a
            single file is remapped by those of this process, if the engine is local.
        inverse_check: read back a random sample of every file and prove it against map and input.
        options: of the object stores, see `open_store`.
        progress: called after each file, and about twice a second meanwhile.

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
        ("file_format", file_format, FILE_FORMATS),
        ("compression", compression, COMPRESSIONS if file_format == "parquet" else tuple(ARROW_CODECS)),
    ):
        if value not in allowed:
            raise ConfigError(f"{name}={value!r} is not one of {', '.join(allowed)}")
    began = time.monotonic()
    options = dict(options or {})
    opened = open_version(registry, version, options)
    folder, files = list_input(input, options)
    out = open_store(output, **options)
    one_file = (
        len(files) == 1 and open_store(input, **options).url == open_store(f"{folder}/{files[0].name}", **options).url
    )
    url = open_store(folder, **options).url
    _check_apart(f"{url}/{files[0].name}" if one_file else url, out.url)
    job = RemapJob(
        input=open_store(folder, **options).url,
        files=tuple(files),
        file_format=file_format,
        compression=compression,
        remapped=remapped_format(opened, folder, files[0], features, layout, helper, options),
    )
    for file in files:
        check_hive_keys(folder, file, job.remapped)
    output_folder = OutputFolder(out)
    with (
        output_folder.begun(job) as finished,
        engine_of(engine, num_workers=num_workers, num_tasks=len(files) - len(finished)) as workers,
    ):
        done = dict(finished)
        todo = sorted((file for file in files if file.name not in done), key=lambda file: -file.num_bytes)
        total = sum(file.num_bytes for file in todo)
        counters = workers.counters(2 * len(todo))
        tasks = [
            FileTask(
                registry=registry,
                options=options,
                folder=folder,
                output=output,
                remapped=job.remapped,
                file_format=file_format,
                compression=compression,
                file=file,
                output_name=job.output_name(file),
                token=output_folder.token,
                num_threads=max(1, round(workers.num_workers * file.num_bytes / max(1, total))),
                inverse_check=inverse_check,
                number=number,
                counters=counters,
            )
            for number, file in enumerate(todo)
        ]
        watcher = _Watcher(progress, tasks, counters, num_finished=len(finished))
        checked = 0
        for task, (file_done, checked_rows) in workers.run(remap_file, tasks, tick=watcher.tick):
            done[task.file.name] = file_done
            checked += checked_rows
            watcher.finished(task, file_done.num_rows)
        manifest = output_folder.complete(job, list(done.values()))
    return RemapReport(
        version=opened.version,
        num_files=len(files),
        num_rows=manifest.num_rows,
        num_bytes=manifest.num_bytes,
        skipped_files=len(finished),
        input_bytes=sum(file.num_bytes for file in files),
        checked_rows=checked,
        unseen=manifest.unseen,
        seconds=time.monotonic() - began,
    )


def remapped_format(
    opened: MapVersion,
    folder: str,
    file: InputFile,
    features: Mapping[str, str] | None,
    layout: Layout,
    helper: HelperPolicy,
    options: Mapping[str, Any],
) -> RemappedFormat:
    """The format of a job's output.

    Args:
        opened: the version whose maps replace raw IDs.
        folder, file: a raw file, whose columns decide where `features` does not.
        features: feature → its raw column; None for all that have a column of their name.
        layout, helper: see `torchrec_cce.data.remapped_format`.
        options: of the object store, see `open_store`.

    Raises:
        ConfigError: a feature that the version does not have, or a helper policy that its maps do not allow.
        DataFileError: the file has no column of a feature's name, or cannot be read.
    """
    tables_of: dict[str, list[str]] = {}
    for table, snapshot in opened.tables.items():
        for feature in snapshot.feature_names:
            tables_of.setdefault(feature, []).append(table)
    if features is None:
        name = f"{folder}/{file.name}"
        with reading(name), open_store(folder, **options).open_file(file.name) as raw:
            columns = {*pq.read_schema(raw).names, *file.hive_keys()}
        features = {feature: feature for feature in tables_of if feature in columns}
        if not features:
            raise DataFileError(
                f"{name}: no column has the name of a feature of {opened.identity}: {', '.join(tables_of)}; name the "
                "column of each in `features`"
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
    remapped = {
        feature_key(feature, table, shared=len(tables_of[feature]) > 1): remapped_feature(
            feature,
            table=table,
            column=column,
            layout=layout,
            helper=helper,
            shared=len(tables_of[feature]) > 1,
            map_digest=(found := opened.tables[table].pointer_map).digest,
            num_columns=found.num_columns,
            num_rows=found.num_rows,
            min_pointer_bits=found.min_pointer_bits,
        )
        for feature, column in features.items()
        for table in tables_of[feature]
    }
    return RemappedFormat(
        format=format_of(remapped),
        version=opened.version,
        manifest_sha256=opened.entry.manifest_sha256,
        layout=layout,
        helper=helper,
        features=remapped,
    )


def check_hive_keys(folder: str, file: InputFile, remapped: RemappedFormat) -> None:
    """Raise DataFileError if the column of a feature is a key of the file's folders."""
    keys = file.hive_keys()
    for feature in remapped.features.values():
        if feature.column in keys:
            raise DataFileError(
                f"{folder}/{file.name}: {feature.column!r}, the column of feature {feature.feature!r}, is a key of its "
                "folders, which are not remapped; write it as a column, or leave the feature out of `features`"
            )


def _check_apart(folder: str, output: str) -> None:
    inputs, outputs = folder.rstrip("/") + "/", output.rstrip("/") + "/"
    if inputs.startswith(outputs) or outputs.startswith(inputs):
        raise ConfigError(f"output {output} and input {folder} lie in one another; choose a folder beside the input")


class _Watcher:
    """Tells `report` how far a job is, from finished files and from what workers count of those in work.

    Args:
        counters: those of `tasks`.
        num_finished: files that an earlier process finished.
    """

    def __init__(
        self,
        report: Callable[[RemapProgress], object],
        tasks: Sequence[FileTask],
        counters: Counters,
        *,
        num_finished: int,
    ) -> None:
        self._report, self._counters = report, counters
        self._left = {task.number: task.file.num_bytes for task in tasks}
        self._done_files, self._num_files = num_finished, num_finished + len(tasks)
        self._num_bytes = sum(self._left.values())
        self._rows = 0
        self._counted = [0] * 2 * len(tasks)

    def finished(self, task: FileTask, num_rows: int) -> None:
        """To be called when a file is finished."""
        del self._left[task.number]
        self._rows += num_rows
        self._done_files += 1
        self._tell()

    def tick(self) -> None:
        """To be called from time to time."""
        self._counted = self._counters.read()
        self._tell()

    def _tell(self) -> None:
        in_work = [self._counted[2 * number : 2 * number + 2] for number in self._left]
        self._report(
            RemapProgress(
                done_files=self._done_files,
                num_files=self._num_files,
                done_bytes=self._num_bytes - sum(self._left.values()) + sum(num_bytes for _, num_bytes in in_work),
                num_bytes=self._num_bytes,
                rows=self._rows + sum(rows for rows, _ in in_work),
            )
        )
