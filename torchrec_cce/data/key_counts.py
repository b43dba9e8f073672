"""`KeyCounts`: how often each 64-bit key occurs in a stream that is too long to hold, in bounded memory.

The last section has the compiled loops; `collections.Counter` is the plain reference of all of them together.
"""

import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from torchrec_cce.errors import ConfigError
from torchrec_cce.hashing import derive_seed
from torchrec_cce.jit import jit
from torchrec_cce.kernels.hash_table import mix, unmix

MIN_MEMORY_BYTES = 1 << 20

_Run: TypeAlias = tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]
"""([m] uint64 hashes in ascending order, [m] int64 how often each occurs)."""

_PARTITION_BITS = 8
_SEED = np.uint64(derive_seed("key_counts"))
_MAX_BATCH = 1 << 18  # 2 MiB of hashes: sorted in a core's cache
_ENTRY_BYTES = 16
# While a batch is counted: its hashes, their counts, and the copies of both that the partitions keep.
_BATCH_ENTRY_BYTES = 32


class KeyCounts:
    """Keys and their counts, for any number of threads that add at once; a context manager.

    A key is hashed by a bijection, and each partition holds a range of hashes as a few sorted runs, each at most half
    as long as the one before: a run that has grown beyond that is merged with it, so that a key is moved O(log n)
    times. When all runs outgrow their share of the memory, each partition is written to a file of its own, in a
    temporary folder (`TMPDIR`) that disappears at the end. Neither the order of the keys, nor the number of threads,
    nor the memory changes a count.
    """

    def __init__(self, *, memory_bytes: int = 1 << 30, num_threads: int = 1) -> None:
        """
        Args:
            memory_bytes: for keys, counts and batches in work, at least 2^20: half of it for the runs, a quarter for
                the batches. Not for what `partitions` yields, beyond the partitions that are merged at a time.
            num_threads: that may add at once, and that merge in `partitions`.

        Raises:
            ConfigError: `memory_bytes < 2^20` or `num_threads < 1`.
        """
        if memory_bytes < MIN_MEMORY_BYTES or num_threads < 1:
            raise ConfigError(
                f"memory_bytes={memory_bytes}, num_threads={num_threads}: the first must be at least "
                f"{MIN_MEMORY_BYTES}, the second at least 1"
            )
        self._num_threads = num_threads
        self._max_held = memory_bytes // (2 * _ENTRY_BYTES)
        self._batch_size = min(_MAX_BATCH, max(1, memory_bytes // (4 * _BATCH_ENTRY_BYTES * (num_threads + 1))))
        self._folder = tempfile.TemporaryDirectory(prefix="torchrec_cce_key_counts_")
        self._partitions = [_Partition(Path(self._folder.name) / f"{p:03}") for p in range(1 << _PARTITION_BITS)]
        self._batch = np.empty(self._batch_size, np.uint64)
        self._filled = 0
        self._batch_lock, self._spill_lock = Lock(), Lock()

    def __enter__(self) -> "KeyCounts":
        return self

    def __exit__(self, *_error: object) -> None:
        self._folder.cleanup()

    @property
    def spilled_bytes(self) -> int:
        """Bytes written to files so far."""
        return _ENTRY_BYTES * sum(sum(partition.spilled) for partition in self._partitions)

    def add(self, keys: npt.NDArray[np.int64]) -> None:
        """Count each of `keys: [N] int64` once more. The array is free again when this returns."""
        start = 0
        while start < len(keys):
            full = None
            with self._batch_lock:
                taken = keys[start : start + self._batch_size - self._filled]
                mix_into(taken, self._batch[self._filled :])
                self._filled += len(taken)
                if self._filled == self._batch_size:
                    full, self._batch, self._filled = self._batch, np.empty_like(self._batch), 0
            start += len(taken)
            if full is not None:
                self._absorb(full)

    def partitions(self) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Hand over everything that was added, as (distinct keys [m] int64, their counts [m] int64), part by part.

        No key is in two parts. The parts and the order in them are always the same for the same keys. Once this has
        been called, nothing may be added.
        """
        self._absorb(self._batch[: self._filled])
        self._batch, self._filled = self._batch[:0], 0
        with ThreadPoolExecutor(self._num_threads) as pool:
            # One partition a thread at a time: no more are in memory than that.
            for start in range(0, len(self._partitions), self._num_threads):
                yield from pool.map(_Partition.take, self._partitions[start : start + self._num_threads])

    def _absorb(self, hashes: npt.NDArray[np.uint64]) -> None:
        """Count `hashes`, which are overwritten, in the partitions."""
        hashes.sort()
        counts = np.empty(len(hashes), np.int64)
        distinct = count_equal(hashes, counts)
        borders = np.arange(1, len(self._partitions), dtype=np.uint64) << np.uint64(64 - _PARTITION_BITS)
        ends = [0, *np.searchsorted(hashes[:distinct], borders).tolist(), distinct]
        for partition, (start, stop) in zip(self._partitions, pairwise(ends), strict=True):
            if start < stop:
                partition.add((hashes[start:stop].copy(), counts[start:stop].copy()))
        with self._spill_lock:
            if sum(partition.held for partition in self._partitions) > self._max_held:
                for partition in self._partitions:
                    partition.spill()


class _Partition:
    """The counts of one range of hashes: sorted runs in memory, and sorted runs one after the other in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._runs: list[_Run] = []
        self._lock = Lock()
        self.spilled: list[int] = []
        """Entries of each run in the file."""
        self.held = 0
        """Entries in memory."""

    def add(self, run: _Run) -> None:
        with self._lock:
            self._runs.append(run)
            while len(self._runs) > 1 and len(self._runs[-2][0]) < 2 * len(self._runs[-1][0]):
                newer, older = self._runs.pop(), self._runs.pop()
                self._runs.append(_merged(older, newer))
            self.held = sum(len(hashes) for hashes, _ in self._runs)

    def spill(self) -> None:
        with self._lock:
            if not self._runs:
                return
            hashes, counts = _merged_all(self._runs)
            self._runs, self.held = [], 0
            with open(self._path, "ab") as file:
                hashes.tofile(file)
                counts.tofile(file)
            self.spilled.append(len(hashes))

    def take(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """All of its keys and counts, in the order of the hashes; nothing of them stays here."""
        runs, self._runs, self.held = self._runs, [], 0
        if self.spilled:
            with open(self._path, "rb") as file:
                for size in self.spilled:
                    hashes = np.fromfile(file, np.uint64, size)
                    runs.append((hashes, np.fromfile(file, np.int64, size)))
            os.unlink(self._path)
        if not runs:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        hashes, counts = _merged_all(runs)
        keys = hashes.view(np.int64)
        unmix_in_place(keys)
        return keys, counts


def _merged_all(runs: list[_Run]) -> _Run:
    """One run of all `runs`, at least one, which are taken out of the list; the shortest first."""
    while len(runs) > 1:
        runs.sort(key=lambda run: -len(run[0]))
        runs.append(_merged(runs.pop(), runs.pop()))
    return runs.pop()


def _merged(a: _Run, b: _Run) -> _Run:
    size = len(a[0]) + len(b[0])
    hashes, counts = np.empty(size, np.uint64), np.empty(size, np.int64)
    distinct = merge_counts(*a, *b, hashes, counts)
    hashes.resize(distinct, refcheck=False)  # gives the rest of the memory back
    counts.resize(distinct, refcheck=False)
    return hashes, counts


@jit
def mix_into(keys: npt.NDArray[np.int64], hashes: npt.NDArray[np.uint64]) -> None:
    """Write the hash of each of `keys: [N]` to the first N of `hashes`."""
    for i in range(len(keys)):
        hashes[i] = mix(keys[i], _SEED)


@jit
def unmix_in_place(words: npt.NDArray[np.int64]) -> None:
    """Replace each hash by its key, both as the bits of an int64."""
    for i in range(len(words)):
        words[i] = unmix(np.uint64(words[i]), _SEED)


@jit
def count_equal(hashes: npt.NDArray[np.uint64], counts: npt.NDArray[np.int64]) -> int:
    """Move the distinct ones of ascending `hashes: [N]` to their front, write how often each occurs to `counts: [N]`.

    Returns how many are distinct.
    """
    distinct = 0
    start = 0
    for i in range(1, len(hashes) + 1):
        if i == len(hashes) or hashes[i] != hashes[start]:
            hashes[distinct] = hashes[start]
            counts[distinct] = i - start
            distinct += 1
            start = i
    return distinct


@jit
def merge_counts(
    hashes_a: npt.NDArray[np.uint64],
    counts_a: npt.NDArray[np.int64],
    hashes_b: npt.NDArray[np.uint64],
    counts_b: npt.NDArray[np.int64],
    hashes: npt.NDArray[np.uint64],
    counts: npt.NDArray[np.int64],
) -> int:
    """Merge two runs, [a] and [b], into `hashes, counts: [a + b]`, where a hash of both has both counts.

    Returns how many are distinct.
    """
    a = b = distinct = 0
    while a < len(hashes_a) and b < len(hashes_b):
        # Which of the two comes first cannot be predicted, so there is no branch on it.
        hash_a, hash_b = hashes_a[a], hashes_b[b]
        takes_a, takes_b = hash_a <= hash_b, hash_b <= hash_a
        hashes[distinct] = hash_a if takes_a else hash_b
        counts[distinct] = takes_a * counts_a[a] + takes_b * counts_b[b]
        a += takes_a
        b += takes_b
        distinct += 1
    while a < len(hashes_a):
        hashes[distinct], counts[distinct] = hashes_a[a], counts_a[a]
        a += 1
        distinct += 1
    while b < len(hashes_b):
        hashes[distinct], counts[distinct] = hashes_b[b], counts_b[b]
        b += 1
        distinct += 1
    return distinct
