"""What the workers of a clustering do, steps for a column or a range of a table, and where they find what is as large
as the IDs of a table. Nothing here imports torch.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.executor import Clustering, ColumnStep, RangeStep, Totals, named_errors
from torchrec_cce.clustering.fold import ResidentRows
from torchrec_cce.clustering.task import ClusteringInputs, TableTask
from torchrec_cce.errors import ConfigError, MapMismatchError
from torchrec_cce.kernels.quantized_rows import QuantizedArray
from torchrec_cce.maps.bundle import read_tables
from torchrec_cce.maps.manifest import MANIFEST, Manifest
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.registry import Registry
from torchrec_cce.maps.residency_files import read_residencies
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.workers.engine import Shared

Frequencies: TypeAlias = Path | Literal["snapshot"] | None
"""How often the ID of each position was seen: a `.npy` file of [n] numbers that every worker sees; the frequencies of
the map's snapshot; or None to let every ID count once."""


@dataclass(frozen=True, kw_only=True)
class BundleMap:
    """Maps in a folder that `write_folder` made, as checkpoints have them; every worker sees it under this path.

    Its digests are not checked again: whoever starts the job has read the folder with `read_folder`.
    """

    folder: Path

    def open(self) -> Mapping[str, TableSnapshot]:
        """The snapshots by table, memory-mapped. Raises MapFileError if files are missing or damaged."""
        path = self.folder / MANIFEST
        return read_tables(self.folder, Manifest.from_json(path.read_bytes(), str(path)))


@dataclass(frozen=True, kw_only=True)
class RegistryMap:
    """Maps in a registry, which every node fetches once."""

    url: str
    version: int
    options: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Of the object store, see `open_store`; credentials may be among them."""

    def open(self) -> Mapping[str, TableSnapshot]:
        """The snapshots by table, verified and memory-mapped. Raises as `Registry.open`."""
        return Registry(self.url, **self.options).open(self.version).tables


@dataclass(frozen=True, kw_only=True)
class StoredResidents:
    """Where any process finds what the residents of a table have learned. Picklable and small."""

    folder: Path
    """That `write_residencies` made, as checkpoints have it. Its digests are not checked again."""
    rows: Path
    """A file of the numbers of all rows, row after row."""
    shape: tuple[int, int]
    """[m, d]."""
    dtype: str
    """Of the numbers, see `ResidentConfig`."""
    step: float
    """What 1 stands for."""
    importances: Path | None = None
    """A file of those of all rows, [m] float32, see `ResidentRows`."""

    def open(self, table: str) -> ResidentRows:
        """Ages and rows, memory-mapped. Raises MapFileError or OSError if files are missing."""
        numbers = np.memmap(self.rows, self.dtype, "r", shape=self.shape)
        return ResidentRows(
            residency=read_residencies(self.folder, verify=False)[table],
            rows=numbers if self.dtype == "float32" else QuantizedArray(numbers, self.step),
            importances=None if self.importances is None else np.memmap(self.importances, np.float32, "r"),
        )


@dataclass(frozen=True, kw_only=True)
class StoredTable:
    """Where any process finds what is as large as the IDs of a table. Picklable and small."""

    maps: BundleMap | RegistryMap
    map_digest: str
    """Of the map that the table was trained with."""
    frequencies: Frequencies = None
    residents: StoredResidents | None = None
    """Where a phase is open: their rows are folded."""

    def open_residents(self, table: str) -> ResidentRows | None:
        """See `StoredResidents.open`."""
        return None if self.residents is None else self.residents.open(table)

    def find(
        self, table: str, opened: Mapping[str, TableSnapshot]
    ) -> tuple[PointerMap, npt.NDArray[np.integer] | None]:
        """The map of a table, among those of `maps`, and the frequencies, memory-mapped.

        Raises:
            MapMismatchError: the map is another, or there is none.
            ConfigError: there are no such frequencies.
        """
        if table not in opened:
            raise MapMismatchError(f"{self.maps} holds no map of table {table!r}, only of {sorted(opened)}")
        snapshot = opened[table]
        found = snapshot.pointer_map
        if found.digest != self.map_digest:
            raise MapMismatchError(
                f"table {table!r} was trained with the map of digest {self.map_digest[:12]}; {self.maps} "
                f"holds {found.identity}"
            )
        if self.frequencies != "snapshot":
            return found, None if self.frequencies is None else _read_numbers(self.frequencies)
        if snapshot.frequencies is None:
            raise ConfigError(f"table {table!r}: {self.maps} holds no frequencies; pass a file of them, or none")
        return found, snapshot.frequencies


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
    pointer_map, frequencies = table.stored.find(table.name, _maps(table.job, table.stored.maps))
    if table.keys is not None and pointer_map.vocabulary is not None:
        pointer_map.vocabulary.reading_keys(table.keys.get())
    opened = TableTask(
        inputs=table.inputs.get(),
        pointer_map=pointer_map,
        frequencies=frequencies,
        residents=table.stored.open_residents(table.name),
    )
    return opened.clustering


@lru_cache(maxsize=1)  # a table of pairs that is mapped anew costs its page faults anew
def _get(given: SharedValue) -> Any:
    return given.get()


@lru_cache(maxsize=1)
def _maps(_job: str, maps: BundleMap | RegistryMap) -> Mapping[str, TableSnapshot]:
    return maps.open()


def _read_numbers(path: Path) -> npt.NDArray[np.integer]:
    try:
        numbers: npt.NDArray[np.integer] = np.load(path, mmap_mode="r")
    except ValueError as error:
        raise ConfigError(f"{path}: not a .npy file of numbers ({error})") from error
    return numbers
