"""Counts of keys: those of a plain Counter, however the keys come and however little memory there is."""

import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_cce.data.key_counts import MIN_MEMORY_BYTES, KeyCounts, count_equal, merge_counts
from torchrec_cce.errors import ConfigError

EXTREMES = [-(2**63), -1, 0, 1, 2**63 - 1]

any_key = st.sampled_from(EXTREMES) | st.integers(-9, 9) | st.integers(-(2**63), 2**63 - 1)


def drained(counts: KeyCounts) -> tuple[list[int], list[int]]:
    parts = list(counts.partitions())
    return np.concatenate([part[0] for part in parts]).tolist(), np.concatenate([part[1] for part in parts]).tolist()


@given(batches=st.lists(st.lists(any_key, max_size=40), max_size=6), num_threads=st.integers(1, 3))
def test_counts_equal_a_counter(batches: list[list[int]], num_threads: int) -> None:
    with KeyCounts(num_threads=num_threads) as counts:
        for batch in batches:
            keys = np.array(batch, np.int64)
            counts.add(keys)
            keys[:] = 12345  # the array is the caller's again
        keys, found = drained(counts)
    assert dict(zip(keys, found, strict=True)) == Counter(key for batch in batches for key in batch)
    assert len(set(keys)) == len(keys)


def skewed_keys(size: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    keys = rng.integers(-(2**63), 2**63 - 1, size)
    keys[::2] = rng.zipf(1.3, len(keys[::2]))
    keys[::1000] = -1
    return keys


def test_neither_order_nor_threads_nor_memory_changes_a_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    keys = skewed_keys(300_000)
    with KeyCounts() as counts:
        counts.add(keys)
        expected = drained(counts)
        assert counts.spilled_bytes == 0
    assert dict(zip(*expected, strict=True)) == Counter(keys.tolist())
    for num_threads in (1, 3):
        shuffled = np.random.default_rng(num_threads).permutation(keys)
        with KeyCounts(memory_bytes=MIN_MEMORY_BYTES, num_threads=num_threads) as counts:
            threads = [
                threading.Thread(target=lambda part=part: [counts.add(some) for some in np.array_split(part, 7)])
                for part in np.array_split(shuffled, num_threads)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            # 150,000 distinct keys take 2.4 MB, half a MiB may be held at once.
            assert counts.spilled_bytes > 1_500_000
            assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) == counts.spilled_bytes
            assert drained(counts) == expected
    assert list(tmp_path.iterdir()) == []


def test_the_folder_goes_also_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def interrupted() -> None:
        with KeyCounts(memory_bytes=MIN_MEMORY_BYTES) as counts:
            counts.add(skewed_keys(200_000))
            assert any(path.is_file() for path in tmp_path.rglob("*"))
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("memory_bytes", "num_threads"), [(MIN_MEMORY_BYTES - 1, 1), (MIN_MEMORY_BYTES, 0)])
def test_too_little_is_refused(memory_bytes: int, num_threads: int) -> None:
    with pytest.raises(ConfigError, match=f"memory_bytes={memory_bytes}, num_threads={num_threads}"):
        KeyCounts(memory_bytes=memory_bytes, num_threads=num_threads)


any_hashes = st.lists(st.sampled_from([0, 1, 2**63, 2**64 - 1]) | st.integers(0, 20), max_size=40).map(sorted)


@given(any_hashes, any_hashes)
def test_loops_equal_a_counter(one: list[int], other: list[int]) -> None:
    runs = []
    for hashes in (one, other):
        array, counts = np.array(hashes, np.uint64), np.full(len(hashes), -7)
        distinct = count_equal(array, counts)
        runs.append((array[:distinct], counts[:distinct]))
        assert array[:distinct].tolist() == sorted(set(hashes))
        assert counts[:distinct].tolist() == [hashes.count(value) for value in sorted(set(hashes))]
    size = len(runs[0][0]) + len(runs[1][0])
    hashes, counts = np.empty(size, np.uint64), np.empty(size, np.int64)
    distinct = merge_counts(*runs[0], *runs[1], hashes, counts)
    expected = Counter(one + other)
    assert hashes[:distinct].tolist() == sorted(expected)
    assert counts[:distinct].tolist() == [expected[value] for value in sorted(expected)]
