"""What a clustering will take, from a moment of each of its kernels on this machine."""

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from torchrec_cce.clustering.column import PAIR
from torchrec_cce.clustering.entropy import MAX_JOINT_IDS, pointer_entropies
from torchrec_cce.clustering.executor import Stage
from torchrec_cce.clustering.fold import TableFold
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.clustering.task import TableTask
from torchrec_cce.jobs.recluster.cluster import TableSource, table_tasks
from torchrec_cce.jobs.recluster.memory_plan import MemoryPlan, memory_plan

_FEW = 1 << 15
_FEW_ITERATIONS = 4
_CALLS = 3


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """One stage of all tables."""

    tasks: int
    seconds: float
    """From its start to its end, if nothing else runs on the machine: right to a factor of two or so."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What `cluster` would do with the same arguments. It does not count the start of the workers."""

    stages: Mapping[Stage, StageEstimate]
    memory_bytes: int
    """The most of this process and all workers together, of what no file backs."""
    disk_bytes: int
    """Of files without a name, in the work and cache folders."""


def estimate(
    sources: Sequence[TableSource], settings: ReclusterConfig, *, num_workers: int, memory_bytes: int
) -> Estimate:
    """Run a little of everything that `cluster` would do, on one thread, and multiply. Nothing is written.

    Raises:
        As `cluster` before its workers begin.
    """
    tables = table_tasks(sources, 0, replace(settings, num_threads=1))
    chosen = memory_plan(tables, num_workers, memory_bytes)
    costs = [_Costs(table, chosen) for table in tables]
    columns = [cost.column / chosen.threads_per_column for cost in costs for _ in range(cost.num_columns)]
    at_once = num_workers // chosen.threads_per_column

    digests = [cost.digest for cost in costs]
    return Estimate(
        stages={
            # No stage is shorter than its longest task.
            "k-means": StageEstimate(tasks=len(columns), seconds=max([0.0, sum(columns) / at_once, *columns])),
            "pairs": StageEstimate(
                tasks=_num_tasks((cost.num_pairs for cost in costs), chosen),
                seconds=sum(cost.pairs for cost in costs) / num_workers,
            ),
            "assignment": StageEstimate(
                tasks=_num_tasks((cost.num_ids for cost in costs), chosen),
                seconds=sum(cost.assignment for cost in costs) / num_workers,
            ),
            "digest": StageEstimate(
                tasks=len(digests), seconds=max([0.0, sum(digests) / chosen.tables_at_a_time, *digests])
            ),
        },
        memory_bytes=chosen.memory_bytes,
        disk_bytes=chosen.disk_bytes,
    )


class _Costs:
    """Seconds of one thread for all of a table, from those for a part of it. Its old codebooks stand for the new."""

    def __init__(self, table: TableTask, chosen: MemoryPlan) -> None:
        clustering = table.clustering
        self.num_ids: int = clustering.num_ids
        self.num_columns: int = clustering.num_columns
        self.num_pairs = clustering.num_pairs
        self.column = _column_seconds(table)

        centroids = list(table.inputs.weights[:, 0])
        self.pairs = 0.0
        pairs = None
        if self.num_pairs:
            found = np.empty(min(_FEW, clustering.num_rows**2, self.num_pairs), PAIR)
            self.pairs = _seconds_of_all(
                lambda size: clustering.nearest_pairs(centroids, 0, size, found), len(found), self.num_pairs, chosen
            )
            # Of the table of pairs only the size is needed here.
            pairs = np.broadcast_to(found[:1], (self.num_pairs,))
        pointers = np.empty((min(_FEW, self.num_ids), self.num_columns), clustering.pointer_dtype)
        self.assignment = _seconds_of_all(
            lambda size: clustering.assign(centroids, 0, size, pointers, pairs), len(pointers), self.num_ids, chosen
        )

        stored = table.inputs.pointer_format.encode(pointers)
        data = stored.reshape(-1).view(np.uint8).data
        hashing = _seconds(lambda: hashlib.sha256(data))
        counting = _seconds(lambda: np.bincount(pointers[:, 0].astype(np.int64)))
        joining = _seconds(lambda: pointer_entropies(pointers, clustering.num_rows))
        each = hashing + self.num_columns * counting
        self.digest = (each * self.num_ids + joining * min(self.num_ids, MAX_JOINT_IDS)) / len(pointers)


def _column_seconds(table: TableTask) -> float:
    """To train one column. An iteration has a cost of its own and one for each point, and so has all around it."""
    clustering, settings = table.clustering, table.inputs.settings

    def train(points_per_centroid: int, num_iterations: int) -> Callable[[], object]:
        few = replace(settings, points_per_centroid=points_per_centroid, num_iterations=num_iterations)
        part = replace(table, inputs=replace(table.inputs, settings=few))
        return lambda: part.clustering.train([0])

    def num_points(points_per_centroid: int) -> int:
        most = min(clustering.num_ids, clustering.num_rows**2)  # of different embeddings
        if isinstance(clustering, TableFold):
            most = clustering.num_residents
        return min(most, points_per_centroid * clustering.num_rows)

    some = min(settings.points_per_centroid, 1 + _FEW // clustering.num_rows)
    more = min(settings.points_per_centroid, 4 * some)
    sizes = num_points(some), num_points(more), num_points(settings.points_per_centroid)
    first, each = [], []
    for points_per_centroid in (some, more):
        first.append(_seconds(train(points_per_centroid, 1)))
        several = _seconds(train(points_per_centroid, 1 + _FEW_ITERATIONS))
        each.append(max(0.0, several - first[-1]) / _FEW_ITERATIONS)
    return _extended(first, *sizes) + (settings.num_iterations - 1) * _extended(each, *sizes)


def _seconds_of_all(function: Callable[[int], object], few: int, everything: int, chosen: MemoryPlan) -> float:
    """For `everything`, in tasks, where a task has a cost of its own and one for each of its items."""
    fewer = -(-few // 8)
    seconds = [_seconds(lambda: function(fewer)), _seconds(lambda: function(few))]
    num_tasks = _num_tasks([everything], chosen)
    return num_tasks * _extended(seconds, fewer, few, everything // num_tasks)


def _extended(seconds: Sequence[float], few: int, more: int, everything: int) -> float:
    """Where the line through the `seconds` at `few` and at `more` is at `everything`; never less than at `more`."""
    low, high = seconds
    slope = max(0.0, high - low) / max(1, more - few)
    return high + slope * max(0, everything - more)


def _seconds(function: Callable[[], object]) -> float:
    """CPU seconds of a call, the least of some: the first may have to compile something, and others run beside it."""
    function()
    seconds = []
    for _ in range(_CALLS):
        started = time.process_time()
        function()
        seconds.append(time.process_time() - started)
    return min(seconds)


def _num_tasks(sizes: Iterable[int], chosen: MemoryPlan) -> int:
    return sum(-(-size // chosen.ids_at_a_time) for size in sizes)
