"""Clustering all tables of a model by the workers of an engine, in memory that does not grow with the number of IDs."""

import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.executor import ColumnStep, Executor, Extent, RangeStep, Stage, Totals
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.clustering.task import TableTask, recluster_maps
from torchrec_cce.errors import ConfigError
from torchrec_cce.files.cache import scratch_array
from torchrec_cce.jobs.recluster.memory_plan import MemoryPlan, memory_plan
from torchrec_cce.jobs.recluster.work import (
    ColumnTask,
    RangeTask,
    SharedTable,
    SharedValue,
    Span,
    StoredTable,
    do_column,
    do_range,
    timed,
)
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.methods.cce import CCEConfig
from torchrec_cce.modules.recluster import TableReport, TableRows, physical_rows, table_task
from torchrec_cce.workers.engine import Engine, Shared

T = TypeVar("T")
Task = TypeVar("Task", ColumnTask, RangeTask)
Result = TypeVar("Result")

Progress = Callable[[Stage, float], None]
"""Told which stage all tables are in, and the share of it, 0 to 1, that is done."""

_ITEMS = {"pairs": "embeddings"}


@dataclass(frozen=True, kw_only=True, eq=False)
class TableSource:
    """One table to cluster."""

    config: CCEConfig
    rows: TableRows
    """The physical table and its optimizer's states, in this process's memory; workers get them from it."""
    stored: StoredTable
    """Where every worker finds the table's map and frequencies, and the rows of its residents."""


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
    """Of `"sampling"`, `"k-means"`, `"pairs"` (only with more IDs than embeddings, and in a fold), `"assignment"` and
    `"digest"`."""


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
    """Cluster tables, or fold the rows of their residents: the bits of `recluster_rows`, whatever the engine, the
    workers and the memory.

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
    names = [source.config.name for source in sources]
    if len(set(names)) < len(names):
        raise ConfigError(f"tables {sorted(names)} are not all of different names")
    tasks = table_tasks(sources, seed, settings)
    executor = _EngineExecutor(
        tasks,
        {source.config.name: source.stored for source in sources},
        engine,
        plan=memory_plan(tasks, engine.num_workers, memory_bytes),
        work_dir=work_dir,
        progress=progress or (lambda _stage, _share: None),
    )
    return {
        name: Clustered(
            pointer_map=new_map,
            rows=physical_rows(done),
            report=TableReport.of_clustering(new_map, done),
            cluster_sizes=done.cluster_sizes,
            times=executor.times(name),
        )
        for name, (new_map, done) in recluster_maps(tasks, executor).items()
    }


def table_tasks(sources: Sequence[TableSource], seed: int, settings: ReclusterConfig) -> list[TableTask]:
    """The tables opened and checked in this process. Raises what `cluster` raises before its workers begin."""
    opened = {maps: maps.open() for maps in {source.stored.maps for source in sources}}
    tasks = []
    for source in sources:
        pointer_map, frequencies = source.stored.find(source.config.name, opened[source.stored.maps])
        task = table_task(
            source.config,
            pointer_map,
            source.rows,
            seed=seed,
            frequencies=frequencies,
            settings=settings,
            residents=source.stored.open_residents(source.config.name),
        )
        _ = task.clustering
        tasks.append(task)
    return tasks


class _EngineExecutor(Executor):
    """The workers of an engine.

    Each stage runs over all tables, what is slow first, so that no worker has to wait for it in the end.

    Args:
        tasks: the tables, opened and checked in this process.
        stored: table → where every worker finds what is as large as its IDs.
        engine, work_dir, progress: as for `cluster`, which also says what is written.

    Raises:
        OSError: `work_dir` or the engine's folder has no room.
    """

    fills_all_tables_at_once = True

    def __init__(
        self,
        tasks: Sequence[TableTask],
        stored: Mapping[str, StoredTable],
        engine: Engine,
        *,
        plan: MemoryPlan,
        work_dir: Path,
        progress: Progress,
    ) -> None:
        super().__init__({task.table: task.clustering for task in tasks})
        self._engine, self._plan, self._work_dir, self._progress = engine, plan, work_dir, progress
        self._token, self._num_values = secrets.token_hex(8), 0
        # What they need is taken now: a disk without room ends the job before it begins.
        self._rooms = {
            task.table: scratch_array(work_dir, (task.clustering.num_ids, form.width), form.dtype)
            for task in tasks
            for form in [task.inputs.pointer_format]
        }
        self._shared = {task.table: self._share_table(task, stored[task.table]) for task in tasks}
        self._spans: dict[str, defaultdict[str, list[Span]]] = {task.table: defaultdict(list) for task in tasks}

    def each(self, stage: Stage, step: ColumnStep[Result]) -> dict[str, list[Result]]:
        names = sorted(self.tables, key=lambda name: -self.tables[name].training_cost)
        tasks = [
            ColumnTask(table=self._shared[name], step=step, column=column, work=self.tables[name].training_cost)
            for name in names
            for column in range(self.tables[name].num_columns)
        ]
        found: dict[str, dict[int, Result]] = {name: {} for name in self.tables}
        for task, (result, spans) in self._run(stage, do_column, tasks, self._plan.threads_per_column):
            found[task.table.name][task.column] = result
            for part, span in spans.items():
                self._spans[task.table.name][part].append(span)
        return {name: [columns[column] for column in range(len(columns))] for name, columns in found.items()}

    def fill(self, stage: Stage, step: RangeStep[T], extents: Sequence[Extent[T]]) -> list[tuple[Any, Totals]]:
        arrays = {extent.table: self._room(stage, extent) for extent in extents}
        sums: dict[str, Totals] = {}
        tasks = [
            RangeTask(
                table=self._shared[extent.table],
                step=step,
                given=extent.given,  # type: ignore[arg-type]  # what `share` returned
                start=start,
                stop=min(start + self._plan.ids_at_a_time, extent.length),
                item=extent.item,
                items=_ITEMS.get(stage, "positions"),
            )
            for extent in extents
            for start in range(0, extent.length, self._plan.ids_at_a_time)
        ]
        for task, (part, totals, span) in self._run(stage, do_range, tasks):
            name = task.table.name
            arrays[name][task.start : task.stop] = part
            sums[name] = sums[name] + totals if name in sums else totals
            self._spans[name][stage].append(span)
        return [(arrays.pop(extent.table), sums[extent.table]) for extent in extents]

    def per_table(self, stage: Stage, function: Callable[[str], Result]) -> dict[str, Result]:
        """In threads of this process: digests, and most of the entropies, release the GIL."""

        def measured(name: str) -> Result:
            with timed(time.thread_time) as span:
                result = function(name)
            self._spans[name][stage].append(span)
            return result

        done: dict[str, Result] = {}
        with ThreadPoolExecutor(self._plan.tables_at_a_time) as pool:
            for name, result in zip(self.tables, pool.map(measured, self.tables), strict=True):
                done[name] = result
                self._progress(stage, len(done) / len(self.tables))
        return done

    def share(self, value: T) -> Shared[T]:
        self._num_values += 1
        return SharedValue(token=f"{self._token}-{self._num_values}", value=self._engine.share(value))

    def times(self, table: str) -> dict[str, StageTime]:
        """What the stages of a table took; see `Clustered`."""
        return {stage: _time_of(spans) for stage, spans in self._spans[table].items()}

    def _room(self, stage: Stage, extent: Extent[Any]) -> Any:
        """Where the items of an extent go: a file without a name."""
        if stage == "assignment":
            return self._rooms.pop(extent.table)
        return scratch_array(self._work_dir, (extent.length, *extent.item.shape), extent.item.base)

    def _share_table(self, task: TableTask, stored: StoredTable) -> SharedTable:
        keys, vocabulary = None, task.pointer_map.vocabulary
        if vocabulary is not None:
            room = scratch_array(self._work_dir, (vocabulary.num_ids,), np.int64)
            keys = self._engine.share(vocabulary.keys(room))
        settings = replace(
            task.inputs.settings, chunk_size=self._plan.chunk_size, num_threads=self._plan.threads_per_column
        )
        inputs = self._engine.share(replace(task.inputs, settings=settings))
        return SharedTable(job=self._token, name=task.table, stored=stored, inputs=inputs, keys=keys)

    def _run(
        self, stage: Stage, function: Callable[[Task], Result], tasks: Sequence[Task], threads: int = 1
    ) -> Iterator[tuple[Task, Result]]:
        done, everything = 0, sum(task.work for task in tasks)
        for task, result in self._engine.run(function, tasks, threads=threads):
            yield task, result
            done += task.work
            self._progress(stage, done / everything)


def _time_of(spans: Sequence[Span]) -> StageTime:
    wall = until = 0.0
    for span in sorted(spans, key=lambda span: span.start):
        wall += max(0.0, span.stop - max(span.start, until))
        until = max(span.stop, until)
    return StageTime(wall=wall, cpu=sum(span.cpu for span in spans))
