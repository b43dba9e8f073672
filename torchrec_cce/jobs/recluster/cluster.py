"""Clustering all tables of a model by the workers of an engine, in memory that does not grow with the number of IDs."""

import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.column import PAIR, TrainedColumn, sum_errors
from torchrec_cce.clustering.entropy import pointer_entropies
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.clustering.table import TableClustering
from torchrec_cce.errors import ConfigError
from torchrec_cce.files.cache import scratch_array
from torchrec_cce.jobs.recluster.memory_plan import Plan, plan
from torchrec_cce.jobs.recluster.source import BundleMap, RegistryMap, StoredTable
from torchrec_cce.jobs.recluster.work import (
    Centroids,
    ColumnTask,
    LearnedTable,
    PairsTask,
    RangeTask,
    SharedTable,
    Span,
    assign_range,
    find_pairs,
    timed,
    train_column,
)
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.methods.cce import CCEConfig
from torchrec_cce.modules.parameter_store import TableRows
from torchrec_cce.modules.recluster import TableReport, TableTask, report_of
from torchrec_cce.workers.engine import Engine, Shared

T = TypeVar("T")
Task = TypeVar("Task", ColumnTask, PairsTask, RangeTask)
Result = TypeVar("Result")

Stage = Literal["k-means", "pairs", "assignment", "digest"]
Progress = Callable[[Stage, float], None]
"""Told which stage all tables are in, and the share of it, 0 to 1, that is done."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TableSource:
    """One table to cluster."""

    config: CCEConfig
    rows: TableRows
    """The physical table and its optimizer's states, in this process's memory; workers get them from it."""
    maps: BundleMap | RegistryMap
    """Where every worker finds the table's map."""
    map_digest: str
    """Of the map that the table was trained with: another one ends the job."""
    frequencies: Path | Literal["snapshot"] | None = None
    """How often each row was seen: a `.npy` file of [n] numbers that every worker sees; the frequencies that lie beside
    the map; or None to let every ID count once."""

    @property
    def stored(self) -> StoredTable:
        return StoredTable(
            table=self.config.name, maps=self.maps, map_digest=self.map_digest, frequencies=self.frequencies
        )


@dataclass(frozen=True, kw_only=True)
class StageTime:
    """What one stage of one table took."""

    wall: float
    """Seconds in which at least one of its tasks was in work."""
    cpu: float
    """CPU seconds of its tasks, on all workers together."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Clustered:
    """A table after its clustering, in the process that started the job. Nothing was changed or published yet."""

    pointer_map: PointerMap
    """The new map, its digest known. Its pointers are a memory-mapped file without a name, which is gone with them."""
    rows: TableRows
    """The new physical table and optimizer states, in the shapes of the source's."""
    report: TableReport
    """Its `seconds` are those from the start of the job to the end of the table."""
    cluster_sizes: npt.NDArray[np.int64]
    """[c, k]: how many IDs each codebook row has."""
    times: Mapping[str, StageTime]
    """Of `"sampling"`, `"k-means"`, `"pairs"` (only with more IDs than embeddings), `"assignment"` and `"digest"`."""


def cluster(
    sources: Sequence[TableSource],
    engine: Engine,
    *,
    seed: int,
    settings: ReclusterConfig,
    memory_bytes: int,
    work_dir: Path,
    progress: Progress | None = None,
) -> dict[str, Clustered]:
    """Cluster tables: the bits of `recluster_rows`, whatever the engine, the workers and the memory.

    The columns of all tables are trained in parallel, then the possible embeddings of each table that has more IDs than
    those are assigned in parallel, then the IDs in ranges. Nothing is written but files without a name in `work_dir`,
    which has room for the new maps or the job ends before it begins, and what the engine shares.

    Args:
        sources: tables of different names.
        engine: entered.
        seed: as for `recluster_rows`.
        settings: `num_threads` is the engine's workers, and `chunk_size` is lowered where memory is short.
        memory_bytes: for this process and all workers together, of what no file backs.
        work_dir: on a disk with room for the new maps and the tables of pairs.
        progress: called in this thread.

    Returns:
        table name → what became of it.

    Raises:
        ConfigError: `memory_bytes` is too small; the message names the least that is enough.
        ClusteringError: NaN or infinite weights; names the table.
        MapMismatchError: a map is not the one that a source says.
        JobError: a worker vanished. Nothing is left behind.
        OSError: `work_dir` or the engine's folder has no room.
    """
    started = time.perf_counter()
    names = [source.config.name for source in sources]
    if len(set(names)) < len(names):
        raise ConfigError(f"tables {sorted(names)} are not all of different names")
    tasks = table_tasks(sources, seed, settings)
    chosen = plan(tasks, engine.num_workers, memory_bytes)
    token = secrets.token_hex(8)
    tables = [
        _new_table(source.stored, task, token, engine, work_dir, chosen)
        for source, task in zip(sources, tasks, strict=True)
    ]
    job = _Job(
        engine=engine,
        plan=chosen,
        work_dir=work_dir,
        progress=progress or (lambda _stage, _share: None),
        tables=tables,
    )
    job.train()
    job.find_pairs()
    job.assign()
    return job.finish(started)


def table_tasks(sources: Sequence[TableSource], seed: int, settings: ReclusterConfig) -> list[TableTask]:
    """The tables opened and checked in this process. Raises what `cluster` raises before its workers begin."""
    opened = {maps: maps.open() for maps in {source.maps for source in sources}}
    tasks = []
    for source in sources:
        pointer_map, frequencies = source.stored.find(opened[source.maps])
        tasks.append(
            TableTask(
                config=source.config,
                pointer_map=pointer_map,
                rows=source.rows,
                seed=seed,
                frequencies=frequencies,
                settings=settings,
            )
        )
        _ = tasks[-1].clustering
    return tasks


@dataclass(kw_only=True, eq=False)
class _Table:
    """One table on its way."""

    task: TableTask
    shared: SharedTable
    pointers: npt.NDArray[np.unsignedinteger]
    """[n, c], in the making."""
    trained: dict[int, TrainedColumn] = field(default_factory=dict)
    centroids: Shared[Centroids] | None = None
    pairs: Shared[npt.NDArray[np.void]] | None = None
    totals: npt.NDArray[np.int64] | None = None
    """[c, t], of the ranges so far."""
    spans: defaultdict[str, list[Span]] = field(default_factory=lambda: defaultdict(list))

    @property
    def name(self) -> str:
        return self.shared.name

    @property
    def clustering(self) -> TableClustering:
        return self.task.clustering

    def own_centroids(self) -> Centroids:
        return [column.centroids for column in self.columns()]

    def columns(self) -> list[TrainedColumn]:
        """In their order, on which sums of floats depend."""
        return [self.trained[column] for column in range(self.clustering.num_columns)]


def _new_table(
    stored: StoredTable, task: TableTask, token: str, engine: Engine, work_dir: Path, chosen: Plan
) -> _Table:
    clustering, vocabulary = task.clustering, task.pointer_map.vocabulary
    pointers = scratch_array(work_dir, (clustering.num_ids, clustering.num_columns), clustering.pointer_dtype)
    keys = None
    if vocabulary is not None:
        keys = engine.share(vocabulary.keys(scratch_array(work_dir, (clustering.num_ids,), np.int64)))
    settings = replace(task.settings, chunk_size=chosen.chunk_size, num_threads=chosen.threads_per_column)
    inputs = engine.share(replace(task.inputs, settings=settings))
    shared = SharedTable(job=token, name=stored.table, stored=stored, inputs=inputs, keys=keys)
    return _Table(task=task, shared=shared, pointers=pointers)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    """The stages, each over all tables: what is slow comes first, so that no worker has to wait for it in the end."""

    engine: Engine
    plan: Plan
    work_dir: Path
    progress: Progress
    tables: list[_Table]

    def train(self) -> None:
        """Fills `trained` and `centroids`."""
        tables = sorted(self.tables, key=lambda table: -table.clustering.training_cost)
        tasks = [
            ColumnTask(table=table.shared, column=column, work=table.clustering.training_cost)
            for table in tables
            for column in range(table.clustering.num_columns)
        ]
        for table, task, (trained, spans) in self._run("k-means", train_column, tasks, self.plan.threads_per_column):
            table.trained[task.column] = trained
            for stage, span in spans.items():
                table.spans[stage].append(span)
        for table in self.tables:
            table.centroids = self.engine.share(table.own_centroids())

    def find_pairs(self) -> None:
        """Fills `pairs`, where there are any."""
        tables = [table for table in self.tables if table.clustering.num_pairs]
        found = {table.name: scratch_array(self.work_dir, (table.clustering.num_pairs,), PAIR) for table in tables}
        tasks = [
            PairsTask(table=table.shared, centroids=_there(table.centroids), start=start, stop=stop)
            for table in tables
            for start, stop in _ranges(table.clustering.num_pairs, self.plan.ids_at_a_time)
        ]
        for table, task, (part, span) in self._run("pairs", find_pairs, tasks):
            found[table.name][task.start : task.stop] = part
            table.spans["pairs"].append(span)
        for table in tables:
            table.pairs = self.engine.share(found.pop(table.name))

    def assign(self) -> None:
        """Fills `pointers` and `totals`."""
        tables = sorted(self.tables, key=lambda table: (table.pairs is not None, -table.clustering.num_ids))
        tasks = [
            RangeTask(learned=learned, start=start, stop=stop)
            for table in tables
            for learned in [LearnedTable(table=table.shared, centroids=_there(table.centroids), pairs=table.pairs)]
            for start, stop in _ranges(table.clustering.num_ids, self.plan.ids_at_a_time)
        ]
        for table, task, (pointers, totals, span) in self._run("assignment", assign_range, tasks):
            table.pointers[task.start : task.stop] = pointers
            table.totals = totals if table.totals is None else table.totals + totals
            table.spans["assignment"].append(span)

    def finish(self, started: float) -> dict[str, Clustered]:
        """The new tables and maps. In threads: digests, and most of the entropies, release the GIL."""
        done = {}
        with ThreadPoolExecutor(self.plan.tables_at_a_time) as pool:
            for table, one in zip(self.tables, pool.map(_finish, self.tables, repeat(started)), strict=True):
                done[table.name] = one
                self.progress("digest", len(done) / len(self.tables))
        return done

    def _run(
        self, stage: Stage, function: Callable[[Task], Result], tasks: Sequence[Task], threads: int = 1
    ) -> Iterator[tuple[_Table, Task, Result]]:
        of = {table.name: table for table in self.tables}
        done, everything = 0, sum(task.work for task in tasks)
        for task, result in self.engine.run(function, tasks, threads=threads):
            yield of[task.table.name], task, result
            done += task.work
            self.progress(stage, done / everything)


def _finish(table: _Table, started: float) -> Clustered:
    with timed(time.thread_time) as span:
        done = table.clustering.finish(table.own_centroids(), _there(table.totals))
        new_map = table.task.pointer_map.clustered(table.pointers, table.task.helper_hash)
        _ = new_map.digest
        entropies = pointer_entropies(table.pointers, new_map.num_rows)
    table.spans["digest"].append(span)
    report = report_of(
        new_map,
        done,
        sample_errors=sum_errors(table.columns()),
        entropies=entropies,
        seconds=time.perf_counter() - started,
    )
    return Clustered(
        pointer_map=new_map,
        rows=table.task.new_rows(done),
        report=report,
        cluster_sizes=done.cluster_sizes,
        times={stage: _time_of(spans) for stage, spans in table.spans.items()},
    )


def _ranges(total: int, size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + size, total)) for start in range(0, total, size))


def _time_of(spans: Sequence[Span]) -> StageTime:
    wall = until = 0.0
    for span in sorted(spans, key=lambda span: span.start):
        wall += max(0.0, span.stop - max(span.start, until))
        until = max(span.stop, until)
    return StageTime(wall=wall, cpu=sum(span.cpu for span in spans))


def _there(value: T | None) -> T:
    assert value is not None, "a stage before this one fills it"
    return value
