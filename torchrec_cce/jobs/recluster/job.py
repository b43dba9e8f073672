"""The job that clusters the CCE tables of a checkpoint, publishes them, and writes the checkpoint to train on from."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from torchrec_cce.errors import ConfigError, PublishConflictError
from torchrec_cce.files.atomic import flush, flush_all
from torchrec_cce.files.lock import FolderLock, held_folder
from torchrec_cce.jobs.checkpoint.copy import NewTable, copy_checkpoint, replace_tables, stamp_version
from torchrec_cce.jobs.checkpoint.reader import CCECheckpoint, CheckpointTable
from torchrec_cce.jobs.recluster.cluster import Clustered, cluster
from torchrec_cce.jobs.recluster.gates import TableFigures, judge
from torchrec_cce.jobs.recluster.request import ReclusterInput, ReclusterJob, unpack_frequencies
from torchrec_cce.jobs.recluster.summary import ReclusterSummary, read_summary, write_summary
from torchrec_cce.jobs.recluster.work import Frequencies
from torchrec_cce.maps.journal import PublishedVersion
from torchrec_cce.training.config import config_digest
from torchrec_cce.training.data_config import SplitConfig
from torchrec_cce.training.loop import evaluate
from torchrec_cce.training.metrics import Quality
from torchrec_cce.workers import engine_of

Progress = Callable[[str, float], None]
"""Told what is being done, and the share of it, 0 to 1, that is done."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ReclusterResult:
    """A job that has ended, refused or not."""

    summary: ReclusterSummary
    cluster_sizes: Mapping[str, npt.NDArray[np.int64]]
    """Table → [c, k], IDs of each codebook row; empty if there was nothing to do."""


def recluster(job: ReclusterJob, *, progress: Progress | None = None) -> ReclusterResult:
    """Cluster the CCE tables of a checkpoint, publish them if their gates let them, and write the new checkpoint.

    In this order: the output folder is whole on the disk under a hidden name, then the version becomes current, then
    the folder gets its name. Killed at any moment and started again, the job ends as if nothing had happened: it knows
    the version that it has published already, and an output that it has finished. What the gates refuse leaves nothing
    behind.

    Raises:
        ConfigError: the job cannot be done with this checkpoint; the output folder is there, of another job.
        MapMismatchError, MapFileError, DataFileError: checkpoint, maps and registry do not belong together, or one is
            damaged.
        ClusteringError: NaN or infinite weights.
        JobError: a worker vanished, or another job is making the same output.
        PublishConflictError: another version than the one that the checkpoint was trained with is current, or became
            so meanwhile.
        RegistryError: the registry did not answer.
        OSError: a disk is full.
    """
    given = ReclusterInput(job)
    if given.job.output.exists():
        return ReclusterResult(summary=_there_already(given), cluster_sizes={})
    with held_folder(given.job.output) as lock:
        return _ReclusterRun(given, lock, progress or (lambda _step, _share: None)).run()


def _there_already(given: ReclusterInput) -> ReclusterSummary:
    made = read_summary(given.job.output)
    # Records of older versions of this package do not say the weights.
    asked = {name: value for name, value in given.identity.items() if made is None or name in made.identity}
    if made is None or made.identity != asked or "checkpoint" not in asked:
        raise ConfigError(f"{given.job.output}: is there already, of other content; choose another `output`")
    return replace(made, status="there already")


class _ReclusterRun:
    """One job, in a folder of its own."""

    def __init__(self, given: ReclusterInput, lock: FolderLock, progress: Progress) -> None:
        self.given, self.job, self.lock, self.progress = given, given.job, lock, progress
        self.built, self.scratch = lock.folder / "built", lock.folder / "scratch"
        self.seconds: dict[str, float] = {}

    def run(self) -> ReclusterResult:
        given = self.given
        parent = given.parent()
        given.check_room()
        with self.step("copying"):
            copy = copy_checkpoint(given.checkpoint, self.job.checkpoint, self.built)
            tables = copy.tables(given.registry)
            frequencies = self.frequencies(tables)
        before = self.quality()
        clustered = self.cluster(copy, tables, frequencies)
        new = [NewTable(table, clustered[table.name]) for table in tables]
        # Of this number, unless somebody publishes and rolls back meanwhile.
        number = given.registry.state().next_version if parent.child is None else parent.child.version
        with self.step("writing"):
            copy = replace_tables(copy, new, version=number)
        after = self.quality()
        figures = tuple(_figures(each, _counted(each.table, frequencies)) for each in new)
        bce = None if before is None or after is None else (before.bce, after.bce)
        summary = ReclusterSummary(
            status="published" if parent.child is None else "finished",
            checkpoint=given.source,
            output=str(self.job.output),
            registry=given.registry.url,
            parent=parent.version,
            version=number,
            forced=False,
            identity=given.identity,
            tables=figures,
            gates=tuple(judge(figures, self.job.thresholds, bce=bce)),
            before=before,
            after=after,
            seconds=self.seconds,
        )
        sizes = {name: done.cluster_sizes for name, done in clustered.items()}
        if parent.child is not None:
            _check_is_ours(given, parent.child, new)
        elif summary.closed and not self.job.force:
            return ReclusterResult(summary=replace(summary, status="refused", version=None), cluster_sizes=sizes)
        summary = replace(summary, forced=bool(summary.closed))
        write_summary(self.built, summary)
        flush_all(self.built)
        if parent.child is None:
            with self.step("publishing"):
                version = self.publish(parent.version, new, frequencies)
            if version != number:
                summary = replace(summary, version=version)
                stamp_version(copy, new, version=version)
                write_summary(self.built, summary)
                flush_all(self.built)
        self.lock.check()
        _give_name(self.built, self.job.output, summary)
        return ReclusterResult(summary=replace(summary, seconds=self.seconds), cluster_sizes=sizes)

    def frequencies(self, tables: Sequence[CheckpointTable]) -> Mapping[str, Frequencies]:
        """Those that the job was given, or those of the checkpoint."""
        if self.job.frequencies is None:
            return {table.name: "snapshot" for table in tables if table.snapshot.frequencies is not None}
        sizes = {table.name: table.snapshot.pointer_map.num_ids for table in tables}
        return {**unpack_frequencies(self.job.frequencies, self.scratch / "frequencies", sizes)}

    def cluster(
        self, copy: CCECheckpoint, tables: Sequence[CheckpointTable], frequencies: Mapping[str, Frequencies]
    ) -> dict[str, Clustered]:
        folder = self.scratch / "rows"
        sources = [copy.source(table, folder, frequencies.get(table.name)) for table in tables]
        with self.step("clustering"), engine_of(self.job.engine, num_workers=self.job.num_workers) as engine:
            done = cluster(
                sources,
                engine,
                seed=self.given.seed,
                settings=self.given.settings,
                memory_bytes=self.job.memory_bytes,
                work_dir=self.scratch,
                progress=self.progress,
            )
        for stage in dict.fromkeys(stage for table in done.values() for stage in table.times):
            self.seconds[stage] = max(table.times[stage].wall for table in done.values() if stage in table.times)
        return done

    def quality(self) -> Quality | None:
        """Of the checkpoint as it is now, on the validation sample."""
        if self.job.validation is None:
            return None
        assert self.given.config is not None
        with self.step("evaluating"):
            return evaluate(self.given.config, self.built, SplitConfig(path=str(self.job.validation)))

    def publish(self, parent: int, new: Sequence[NewTable], frequencies: Mapping[str, Frequencies]) -> int:
        """The version that is current then."""
        config = self.given.config
        snapshots = {
            table.name: replace(
                table.snapshot,
                pointer_map=clustered.pointer_map,
                weights=clustered.rows.weights,
                frequencies=_counted(table, frequencies),
                entropies=clustered.report.entropies,
                objective=clustered.report.objective,
            )
            for table, clustered in new
        }
        entry = self.given.registry.publish(
            snapshots,
            parent=parent,
            checkpoint=self.given.source,
            config_digest=None if config is None else config_digest(config),
            confirm=self.lock.check,
        )
        return entry.version

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Tell what is being done, and note how long it takes."""
        self.progress(name, 0.0)
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        self.progress(name, 1.0)


def _counted(table: CheckpointTable, frequencies: Mapping[str, Frequencies]) -> npt.NDArray[np.int64] | None:
    """[n] int64 of a table, memory-mapped."""
    where = frequencies.get(table.name)
    if where == "snapshot":
        return table.snapshot.frequencies
    return None if where is None else np.load(where, mmap_mode="r")


def _figures(new: NewTable, frequencies: npt.NDArray[np.int64] | None) -> TableFigures:
    pointer_map, report = new.clustered.pointer_map, new.clustered.report
    assert report.sample_errors is not None
    unseen = None
    if frequencies is not None:
        unseen = 1 - int(np.count_nonzero(frequencies)) / pointer_map.num_ids
    return TableFigures(
        table=new.table.name,
        num_ids=pointer_map.num_ids,
        num_columns=pointer_map.num_columns,
        num_rows=pointer_map.num_rows,
        generation=pointer_map.generation,
        entropies=report.entropies,
        error=report.sample_errors.new,
        parent_error=report.sample_errors.parent,
        variance=report.sample_errors.total,
        churn=report.share_changed,
        unseen=unseen,
    )


def _check_is_ours(given: ReclusterInput, child: PublishedVersion, new: Sequence[NewTable]) -> None:
    """Raise PublishConflictError unless the version `child` is what this job would publish."""
    theirs = {name: table.map_digest for name, table in given.registry.manifest(child.version).tables.items()}
    if theirs != {table.name: clustered.pointer_map.digest for table, clustered in new}:
        raise PublishConflictError(
            f"{given.registry.url}: {child.identity} was made from the same checkpoint in another way, and is current; "
            "roll back first, or train on from it"
        )


def _give_name(built: Path, output: Path, summary: ReclusterSummary) -> None:
    try:
        built.rename(output)
    except OSError as error:
        message = f"{error.strerror}; version {summary.version} is published, make room and run the job again"
        raise OSError(error.errno, message, str(output)) from error
    flush(output.parent)
