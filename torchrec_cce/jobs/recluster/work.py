"""What the workers of a clustering do: train a column, look for the nearest centroids of embeddings, assign IDs."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.column import PAIR, TrainedColumn
from torchrec_cce.clustering.inputs import ClusteringInputs, named_errors
from torchrec_cce.clustering.table import TableClustering
from torchrec_cce.jobs.recluster.source import BundleMap, RegistryMap, StoredTable
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.workers.engine import Shared

Centroids = list[npt.NDArray[np.float32]]


@dataclass(kw_only=True)
class Span:
    """When something was done, and what it cost."""

    start: float = 0.0
    """Seconds since 1970."""
    stop: float = 0.0
    cpu: float = 0.0
    """CPU seconds, of the process or of the thread."""


@dataclass(frozen=True, kw_only=True)
class SharedTable:
    """A table as a worker gets it. Picklable and small."""

    job: str
    """A token: tables are compared by it and their names alone."""
    name: str
    stored: StoredTable = field(compare=False)
    inputs: Shared[ClusteringInputs] = field(compare=False)
    keys: Shared[npt.NDArray[np.int64]] | None = field(compare=False)
    """[n] the raw ID of each row, where the map has a vocabulary."""


@dataclass(frozen=True, kw_only=True)
class LearnedTable:
    """What the IDs of a table are assigned by. Compared as its table is."""

    table: SharedTable
    centroids: Shared[Centroids] = field(compare=False)
    pairs: Shared[npt.NDArray[np.void]] | None = field(compare=False)


@dataclass(frozen=True, kw_only=True)
class ColumnTask:
    """Train one column."""

    table: SharedTable
    column: int
    work: int
    """What it costs, in any unit that all columns share."""

    def __str__(self) -> str:
        return f"k-means of column {self.column} of table {self.table.name!r}"


@dataclass(frozen=True, kw_only=True)
class PairsTask:
    """Assign the embeddings `start … stop − 1` of a table."""

    table: SharedTable
    centroids: Shared[Centroids]
    start: int
    stop: int

    @property
    def work(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"embeddings {self.start} to {self.stop - 1} of table {self.table.name!r}"


@dataclass(frozen=True, kw_only=True)
class RangeTask:
    """Assign the IDs `start … stop − 1` of a table."""

    learned: LearnedTable
    start: int
    stop: int

    @property
    def table(self) -> SharedTable:
        return self.learned.table

    @property
    def work(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"rows {self.start} to {self.stop - 1} of table {self.table.name!r}"


def train_column(task: ColumnTask) -> tuple[TrainedColumn, dict[str, Span]]:
    """The trained column, and the spans of `"sampling"` and `"k-means"`."""
    clustering = _open(task.table)
    with named_errors(task.table.name):
        with timed() as sampling:
            _ = clustering.sample
        with timed() as training:
            (trained,) = clustering.train([task.column])
    return trained, {"sampling": sampling, "k-means": training}


def find_pairs(task: PairsTask) -> tuple[npt.NDArray[np.void], Span]:
    """[stop − start] PAIR."""
    clustering = _open(task.table)
    with timed() as span, named_errors(task.table.name):
        found = np.empty(task.stop - task.start, PAIR)
        clustering.nearest_pairs(task.centroids.get(), task.start, task.stop, found)
    return found, span


def assign_range(task: RangeTask) -> tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.int64], Span]:
    """The new pointers [stop − start, c], and the totals [c, t]."""
    clustering, (centroids, pairs) = _open(task.table), _get(task.learned)
    with timed() as span, named_errors(task.table.name):
        pointers = np.empty((task.stop - task.start, clustering.num_columns), clustering.pointer_dtype)
        totals = clustering.assign(centroids, task.start, task.stop, pointers, pairs)
    return pointers, totals, span


@contextmanager
def timed(cpu_time: Callable[[], float] = time.process_time) -> Iterator[Span]:
    """Measure the block."""
    span = Span(start=time.time())
    before = cpu_time()
    yield span
    span.stop = time.time()
    span.cpu = cpu_time() - before


@lru_cache(maxsize=1)  # tasks of one table follow each other
def _open(table: SharedTable) -> TableClustering:
    pointer_map, frequencies = table.stored.find(_maps(table.job, table.stored.maps))
    if table.keys is not None and pointer_map.vocabulary is not None:
        pointer_map.vocabulary.reading_keys(table.keys.get())
    return table.inputs.get().clustering(pointer_map, frequencies)


@lru_cache(maxsize=1)  # a table of pairs that is mapped anew costs its page faults anew
def _get(learned: LearnedTable) -> tuple[Centroids, npt.NDArray[np.void] | None]:
    return learned.centroids.get(), None if learned.pairs is None else learned.pairs.get()


@lru_cache(maxsize=1)
def _maps(_job: str, maps: BundleMap | RegistryMap) -> Mapping[str, TableSnapshot]:
    return maps.open()
