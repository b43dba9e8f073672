"""How much of a clustering is done at a time, so that it fits the memory that it is given."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchrec_cce.clustering.entropy import MAX_JOINT_IDS
from torchrec_cce.clustering.fold import TableFold
from torchrec_cce.clustering.task import TableTask
from torchrec_cce.errors import ConfigError
from torchrec_cce.maps.pointer_format import CODES_AT_A_TIME

# A worker with FAISS and the compiled loops, before it has any data: what no file backs.
_PROCESS_BYTES = 128 << 20
_MOST_AT_A_TIME, _LEAST_AT_A_TIME = 1 << 20, 1 << 12
_FEWEST_WORTH_A_TASK = 1 << 16
_TASKS_PER_WORKER = 8
_PAIRS_AT_A_TIME = 1 << 16
_FREQUENCIES_AT_A_TIME = 1 << 20
_HISTOGRAM_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How a clustering is cut up. Nothing in it changes the result."""

    ids_at_a_time: int
    """IDs, and embeddings, of a task."""
    chunk_size: int
    """IDs that a task handles at a time."""
    threads_per_column: int
    """Threads that train a column: more than one where there are more workers than columns."""
    tables_at_a_time: int
    """Tables whose digests and entropies are computed at a time."""
    memory_bytes: int
    """The most that is needed, of what no file backs, by this process and all workers together."""
    disk_bytes: int
    """Of files without a name, in the work and cache folders."""


def memory_plan(tables: Sequence[TableTask], num_workers: int, memory_bytes: int) -> MemoryPlan:
    """The largest steps that fit into `memory_bytes`.

    Raises:
        ConfigError: none do; the message names the least that is enough.
    """
    sizes = [_Size(table) for table in tables]
    num_columns = sum(size.columns for size in sizes)
    everything = sum(size.ids for size in sizes) // (_TASKS_PER_WORKER * num_workers)
    own = _own_bytes()
    most = min(_MOST_AT_A_TIME, max(_FEWEST_WORTH_A_TASK, 1 << everything.bit_length()))
    while True:
        chunk_size = min([most, *(table.inputs.settings.chunk_size for table in tables)])
        worker = _PROCESS_BYTES + max((size.worker(most, chunk_size) for size in sizes), default=0)
        driver = own + sum(size.new_tables for size in sizes)
        # Tasks in flight, and one result that is being received.
        in_flight = (2 * num_workers + 2) * max((size.result(most) for size in sizes), default=0)
        last = max((size.last for size in sizes), default=1)
        need = driver + max(in_flight, last) + num_workers * worker
        if need <= memory_bytes:
            break
        if most == _LEAST_AT_A_TIME:
            raise ConfigError(
                f"memory_bytes={memory_bytes} is too little for these tables and {num_workers} workers; at least "
                f"{need} is needed, of it {worker} for each worker: allow more, or take fewer workers"
            )
        most //= 2
    spare = memory_bytes - driver - num_workers * worker
    return MemoryPlan(
        ids_at_a_time=most,
        chunk_size=chunk_size,
        threads_per_column=max(1, num_workers // max(1, num_columns)),
        tables_at_a_time=max(1, min(spare // last, num_workers)),
        memory_bytes=need,
        disk_bytes=sum(size.disk for size in sizes),
    )


class _Size:
    """Bytes that a table needs, as measured (tests compare them with what numpy allocates), with some to spare."""

    def __init__(self, table: TableTask) -> None:
        clustering = table.clustering
        self.ids: int = clustering.num_ids
        self.columns: int = clustering.num_columns
        self._pairs, self._width = clustering.num_pairs, clustering.width
        self._code_bytes: int = self.columns * clustering.pointer_dtype.itemsize
        self._pointer_bytes = table.inputs.pointer_format.num_bytes
        self._nibbles = table.inputs.pointer_format.nibbles
        self._states = sum(int(state[0, 0, 0].size) for state in table.inputs.row_states.values())
        self._rows = clustering.num_rows
        self._is_fold = isinstance(clustering, TableFold)
        candidates = clustering.num_residents if isinstance(clustering, TableFold) else self.ids
        self._sampled = min(candidates, table.inputs.settings.points_per_centroid * self._rows)
        self._has_frequencies = table.frequencies is not None
        self._has_vocabulary = table.pointer_map.vocabulary is not None

    @property
    def new_tables(self) -> int:
        """Weights, states and sums, until they are handed over."""
        return 2 * self._totals + 8 * self.columns * self._rows * (self._width + self._states)

    @property
    def last(self) -> int:
        """To make new tables of sums, and of pointers their entropies."""
        return self._assigners + 224 * min(self.ids, MAX_JOINT_IDS) + _HISTOGRAM_BYTES

    @property
    def disk(self) -> int:
        """The new pointers; the embeddings' answers, and the keys of a vocabulary, as they are written and shared."""
        return self.ids * self._pointer_bytes + 16 * self._pairs + 16 * self.ids * self._has_vocabulary

    def result(self, most: int) -> int:
        """What a worker returns, and its pickled copy."""
        return 2 * max(self._totals + min(most, self.ids) * self._pointer_bytes, 8 * min(most, self._pairs))

    def worker(self, most: int, chunk_size: int) -> int:
        """The most that any task needs in its worker."""
        chunk = min(chunk_size, self.ids) * (60 * self.columns + 12 * self._width + 40)
        distinct = min(self._sampled, self._rows**2)
        sample = self._sampled * (2 * self._code_bytes + 24)
        codes = min(CODES_AT_A_TIME, most) * self._code_bytes * self._nibbles  # before they are two in a byte
        train = self._sampled * 64 + distinct * (32 * self._width + 72) + 64 * self._rows * self._width
        pairs = min(_PAIRS_AT_A_TIME, self._pairs) * (64 + 16 * self._width)
        frequencies = 32 * min(_FREQUENCIES_AT_A_TIME, self.ids) * self._has_frequencies
        if self._is_fold:  # each resident is a point of its own, and its row is there
            dim = self.columns * self._width
            sample = self._sampled * (8 * self.columns + 4 * dim + 48)
            chunk = min(chunk_size, self.ids) * (24 * self.columns + 12 * self._width + 4 * dim + 64)
            train = (self._sampled + self._rows) * (40 * self._width + 136) + 64 * self._rows * self._width
        return sample + frequencies + codes + max(chunk, train, pairs) + self._assigners + self.result(most)

    @property
    def _totals(self) -> int:
        return 16 * self.columns * self._rows * (1 + self._width + self._states)

    @property
    def _assigners(self) -> int:
        return self.columns * self._rows * (110 * self._width + 90 * self._states + 100)


def _own_bytes() -> int:
    """Memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no RssAnon in /proc/self/status")
