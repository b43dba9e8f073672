"""The hash table's loops against plain Python, and their bounds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.kernel_references import reference_hash, reference_positions, reference_slots
from torchrec_cce.kernels.hash_table import (
    BUCKET,
    count_blocks,
    keys_by_position,
    lookup_positions,
    mix,
    place,
    scatter_blocks,
    sort_block,
    unmix,
)

EXTREMES = [-(2**63), -(2**63) + 1, -1, 0, 1, 2**63 - 1]
MAX_RUN = 64

any_key = st.sampled_from(EXTREMES) | st.integers(-4, 4) | st.integers(-(2**63), 2**63 - 1)
any_seed = st.integers(0, 2**63 - 1)


def built(keys: list[int], num_buckets: int, seed: int, shift: int) -> np.ndarray | None:
    """The slots that the loops make, two threads' worth of parts one after the other; None if one of them refuses."""
    parts = np.array_split(np.array(keys, np.int64), 2)
    width = 1 << shift
    counts = np.zeros((2, -(-num_buckets // width)), np.int64)
    for part, count in zip(parts, counts, strict=True):
        count_blocks(part, num_buckets, seed, shift, count)
    assert counts.sum() == len(keys)
    starts = np.concatenate([[0], np.cumsum(counts.sum(axis=0))])
    pairs = np.full((len(keys), 2), -7)
    scatter_blocks(parts[0], 0, num_buckets, seed, shift, starts[:-1].copy(), pairs)
    scatter_blocks(parts[1], len(parts[0]), num_buckets, seed, shift, starts[:-1] + counts[0], pairs)
    for block in range(len(starts) - 1):
        first = block * width
        inside = pairs[starts[block] : starts[block + 1]]
        if not sort_block(inside, num_buckets, first, min(width, num_buckets - first), MAX_RUN):
            return None
    slots = np.full((BUCKET * num_buckets + MAX_RUN, 2), -7)
    size = place(pairs, num_buckets, seed, MAX_RUN, slots)
    return None if size < 0 else slots[:size]


@given(key=any_key, seed=any_seed)
def test_hash_equals_the_reference_and_can_be_undone(key: int, seed: int) -> None:
    hashed = mix(np.int64(key), np.uint64(seed))
    assert int(hashed) == reference_hash(key, seed)
    assert unmix(np.uint64(hashed), np.uint64(seed)) == key


def test_hash_is_murmur3s() -> None:
    assert [hex(reference_hash(key, 0)) for key in (0, 1, -1)] == ["0x0", "0xb456bcfc34c2cb2c", "0x64b5720b4b825f21"]
    assert reference_hash(0, 1) == reference_hash(1, 0)


@given(
    keys=st.lists(any_key, unique=True, max_size=200),
    num_buckets=st.integers(1, 90),
    seed=any_seed,
    shift=st.integers(0, 7),
)
def test_slots_equal_the_reference(keys: list[int], num_buckets: int, seed: int, shift: int) -> None:
    expected = reference_slots(keys, num_buckets, seed)
    longest = run = 0
    for _, position in expected:
        run = run + 1 if position >= 0 else 0
        longest = max(longest, run)
    slots = built(keys, num_buckets, seed, shift)
    if longest > MAX_RUN:
        assert slots is None
    else:
        assert slots is not None
        assert list(map(tuple, slots.tolist())) == expected


@given(
    keys=st.lists(any_key, unique=True, max_size=150),
    num_buckets=st.integers(1, 90),
    seed=any_seed,
    others=st.lists(any_key, max_size=50),
    repeats=st.integers(1, 12),
)
def test_lookup_equals_the_reference(
    keys: list[int], num_buckets: int, seed: int, others: list[int], repeats: int
) -> None:
    # Down to one bucket, so that most keys are far from home; more keys than are finished together.
    slots = reference_slots(keys, num_buckets, seed)
    queries = (keys + others + EXTREMES) * repeats
    np.random.default_rng(len(queries)).shuffle(queries)
    expected = reference_positions(queries, slots)
    out = np.full(len(queries), -7)
    unseen = lookup_positions(np.array(queries, np.int64), np.array(slots, np.int64), num_buckets, seed, out)
    assert out.tolist() == expected
    assert unseen == expected.count(-1)


@pytest.mark.parametrize("num_buckets", [1, 2, 7, 16, 40])
@pytest.mark.parametrize("size", [3, 4, 5, 63, 64])
def test_crowded_tables_equal_the_reference(num_buckets: int, size: int) -> None:
    # Up to 16 full buckets in a row, the last of them full to the last slot, and position 0 at every place of a bucket.
    for seed in range(20):
        keys = np.random.default_rng(seed).integers(-(2**63), 2**63 - 1, size).tolist()
        expected = reference_slots(keys, num_buckets, seed)
        slots = built(keys, num_buckets, seed, 1)
        assert slots is not None
        assert list(map(tuple, slots.tolist())) == expected
        queries = [*keys, *EXTREMES, *range(2, 40)] * 12
        out = np.full(len(queries), -7)
        assert lookup_positions(np.array(queries), slots, num_buckets, seed, out) == 12 * (len(EXTREMES) + 38)
        assert out.tolist() == reference_positions(queries, expected)


@pytest.mark.parametrize("key", EXTREMES)
def test_no_key_is_reserved(key: int) -> None:
    for keys in ([key], [key, 5], [5, key], []):
        slots = np.array(reference_slots(keys, 1, 9), np.int64)
        out = np.full(1, -7)
        assert lookup_positions(np.array([key]), slots, 1, 9, out) == (key not in keys)
        assert out[0] == (keys.index(key) if key in keys else -1)


@given(keys=st.lists(any_key, min_size=1, max_size=50), seed=any_seed)
def test_more_than_2_to_the_32_buckets(keys: list[int], seed: int) -> None:
    num_buckets, shift = 2**44 + 12345, 36
    counts = np.zeros((num_buckets >> shift) + 1, np.int64)
    count_blocks(np.array(keys, np.int64), num_buckets, seed, shift, counts)
    expected = [reference_hash(key, seed) * num_buckets >> 64 >> shift for key in keys]
    assert counts.tolist() == np.bincount(expected, minlength=len(counts)).tolist()


def crowd(size: int, seed: int) -> list[int]:
    """Keys whose home is the first bucket under `seed`, of any number of buckets."""
    return [int(unmix(np.uint64(hashed), np.uint64(seed))) for hashed in range(size)]


@pytest.mark.parametrize("shift", [0, 3])
def test_a_run_may_be_just_so_long(shift: int) -> None:
    slots = built(crowd(MAX_RUN, 3), 20, 3, shift)
    assert slots is not None
    assert list(map(tuple, slots.tolist())) == reference_slots(crowd(MAX_RUN, 3), 20, 3)
    assert built(crowd(MAX_RUN + 1, 3), 20, 3, shift) is None


def test_a_crowded_bucket_is_refused_before_it_is_sorted() -> None:
    # Quadratic time is at stake: to sort them first and then refuse them would give the same answer.
    for size, fits in ((MAX_RUN, True), (MAX_RUN + 1, False)):
        pairs = np.array([[hashed, 0] for hashed in reversed(range(size))])
        before = pairs.copy()
        assert sort_block(pairs, 20, 0, 20, MAX_RUN) == fits
        np.testing.assert_array_equal(pairs, before[::-1] if fits else before)


def test_a_run_of_full_buckets_counts_although_each_key_is_at_home() -> None:
    def full_buckets(count: int) -> list[int]:
        # Bucket b of 100 begins at the hash b · 2^64 / 100, rounded up.
        return [
            int(unmix(np.uint64(-(-(bucket << 64) // 100) + i), np.uint64(3)))
            for bucket in range(count)
            for i in range(BUCKET)
        ]

    slots = built(full_buckets(MAX_RUN // BUCKET), 100, 3, 2)
    assert slots is not None
    assert len(slots) == BUCKET * 100
    assert built(full_buckets(MAX_RUN // BUCKET + 1), 100, 3, 2) is None


def test_a_key_given_twice_is_refused() -> None:
    keys = list(range(100))
    assert built([*keys, 100], 60, 3, 2) is not None
    assert built([*keys, 57], 60, 3, 2) is None


@given(keys=st.lists(any_key, unique=True, max_size=100), num_buckets=st.integers(1, 60))
def test_keys_by_position(keys: list[int], num_buckets: int) -> None:
    slots = np.array(reference_slots(keys, num_buckets, 1), np.int64)
    out = np.full(len(keys), -7)
    assert keys_by_position(slots, out)
    assert out.tolist() == keys
    if keys:
        shorter = np.full(len(keys) + 1, -7)
        assert not keys_by_position(slots, shorter[: len(keys) - 1])
        assert shorter.tolist() == [*keys[:-1], -7, -7]
        assert not keys_by_position(slots, shorter)
