"""What the workers of a clustering do: steps for a column or a range of a table. Nothing here imports torch."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.executor import Clustering, ColumnStep, RangeStep, Totals, named_errors
from torchrec_cce.clustering.task import ClusteringInputs
from torchrec_cce.jobs.recluster.source import BundleMap, RegistryMap, StoredTable
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.workers.engine import Shared


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
    """[n] the raw ID of each position, where the map has a vocabulary."""


@dataclass(frozen=True, kw_only=True)
class SharedValue:
    """What the ranges of a table share, as a worker gets it. Picklable and small."""

    token: str
    """Values are compared by it alone."""
    value: Shared[Any] = field(compare=False)

    def get(self) -> Any:
        return self.value.get()


@dataclass(frozen=True, kw_only=True)
class ColumnTask:
    """Do a step for one column."""

    table: SharedTable
    step: ColumnStep[Any]
    column: int
    work: int
    """What it costs, in any unit that all columns share."""

    def __str__(self) -> str:
        return f"k-means of column {self.column} of table {self.table.name!r}"


@dataclass(frozen=True, kw_only=True)
class RangeTask:
    """Do a step for the items `start … stop − 1` of a table."""

    table: SharedTable
    step: RangeStep[Any]
    given: SharedValue
    start: int
    stop: int
    item: np.dtype[Any]
    items: str
    """What they are, for messages."""

    @property
    def work(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"{self.items} {self.start} to {self.stop - 1} of table {self.table.name!r}"


def do_column(task: ColumnTask) -> tuple[Any, dict[str, Span]]:
    """The result, and the spans of `"sampling"` and `"k-means"`."""
    clustering = _open(task.table)
    with named_errors(task.table.name):
        with timed() as sampling:
            _ = clustering.sample
        with timed() as training:
            (result,) = task.step(clustering, [task.column])
    return result, {"sampling": sampling, "k-means": training}


def do_range(task: RangeTask) -> tuple[npt.NDArray[Any], Totals, Span]:
    """What was filled, [stop − start, …], and the sums."""
    clustering, given = _open(task.table), _get(task.given)
    with timed() as span, named_errors(task.table.name):
        out = np.empty(task.stop - task.start, task.item)
        totals = task.step(clustering, given, task.start, task.stop, out)
    return out, totals, span


@contextmanager
def timed(cpu_time: Callable[[], float] = time.process_time) -> Iterator[Span]:
    """Measure the block."""
    span = Span(start=time.time())
    before = cpu_time()
    yield span
    span.stop = time.time()
    span.cpu = cpu_time() - before


@lru_cache(maxsize=1)  # tasks of one table follow each other
def _open(table: SharedTable) -> Clustering:
    pointer_map, frequencies = table.stored.find(_maps(table.job, table.stored.maps))
    if table.keys is not None and pointer_map.vocabulary is not None:
        pointer_map.vocabulary.reading_keys(table.keys.get())
    return table.inputs.get().clustering(pointer_map, frequencies)


@lru_cache(maxsize=1)  # a table of pairs that is mapped anew costs its page faults anew
def _get(given: SharedValue) -> Any:
    return given.get()


@lru_cache(maxsize=1)
def _maps(_job: str, maps: BundleMap | RegistryMap) -> Mapping[str, TableSnapshot]:
    return maps.open()
