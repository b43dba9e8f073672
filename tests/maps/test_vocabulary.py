"""Vocabularies: every key, every position, the same bytes however they were built, and keys chosen to collide."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.kernel_references import reference_slots
from torchrec_cce.errors import ConfigError
from torchrec_cce.hashing import derive_seed
from torchrec_cce.kernels.hash_table import unmix
from torchrec_cce.maps.vocabulary import Vocabulary

EXTREMES = [-(2**63), -(2**63) + 1, -1, 0, 1, 2**63 - 1]
GOLDEN_KEYS = np.array([7, -1, 0, 2**63 - 1, -(2**63), 123456789], np.int64)

any_key = st.sampled_from(EXTREMES) | st.integers(-4, 4) | st.integers(-(2**63), 2**63 - 1)


def random_keys(size: int, seed: int = 0) -> np.ndarray:
    keys = np.unique(np.random.default_rng(seed).integers(-(2**63), 2**63 - 1, size))
    np.random.default_rng(seed).shuffle(keys)
    return keys


def crowd(size: int, attempt: int) -> np.ndarray:
    """Keys that all have the first bucket as their home under the seed of this attempt."""
    seed = np.uint64(derive_seed("vocabulary", attempt))
    return np.array([unmix(np.uint64(hashed), seed) for hashed in range(size)], np.int64)


@given(
    keys=st.lists(any_key, unique=True, max_size=300),
    others=st.lists(any_key, max_size=50),
    num_threads=st.integers(1, 5),
)
def test_rows_equal_a_dict(keys: list[int], others: list[int], num_threads: int) -> None:
    vocabulary = Vocabulary.build(np.array(keys, np.int64), num_threads=num_threads)
    positions = {key: position for position, key in enumerate(keys)}
    queries = [*others, *keys, *EXTREMES, *keys]
    assert vocabulary.positions(np.array(queries, np.int64)).tolist() == [positions.get(key, -1) for key in queries]
    assert vocabulary.keys().tolist() == keys
    assert list(map(tuple, vocabulary.slots_view.tolist())) == reference_slots(
        keys, vocabulary.num_buckets, vocabulary.seed
    )


def test_many_keys_make_the_same_bytes_with_any_number_of_threads() -> None:
    keys = random_keys(300_000)
    one = Vocabulary.build(keys, num_threads=1)
    for num_threads in (2, 3, 7, None):
        other = Vocabulary.build(keys, num_threads=num_threads)
        assert other.slots_view.tobytes() == one.slots_view.tobytes()
    assert list(map(tuple, one.slots_view.tolist())) == reference_slots(keys.tolist(), one.num_buckets, one.seed)
    np.testing.assert_array_equal(one.positions(keys), np.arange(len(keys)))
    np.testing.assert_array_equal(one.keys(), keys)
    assert (one.positions(random_keys(10_000, seed=1)) == -1).all()
    assert one.nbytes / len(keys) < 27
    assert one.slots_view.ctypes.data % 64 == 0


def test_digest_never_changes() -> None:
    vocabulary = Vocabulary.build(GOLDEN_KEYS)
    assert vocabulary.header() == {"num_ids": 6, "num_buckets": 3, "seed": 3561924724030111072}
    assert vocabulary.digest == "2444005f14992e5f67f88c80cc0be0ac45edd624c3c6e96ec8944b0b871ea0dc"


def test_digest_covers_all_that_decides_a_lookup() -> None:
    one = Vocabulary.build(GOLDEN_KEYS)
    flat = one.slots.flatten()
    longer = pa.FixedSizeListArray.from_arrays(pa.concat_arrays([flat, flat.slice(len(flat) - 8)]), type=one.slots.type)
    others = [
        Vocabulary.build(GOLDEN_KEYS[::-1]),
        Vocabulary.build(GOLDEN_KEYS[:-1]),
        Vocabulary(slots=one.slots, num_ids=6, num_buckets=one.num_buckets, seed=one.seed + 1),
        Vocabulary(slots=one.slots, num_ids=6, num_buckets=one.num_buckets - 1, seed=one.seed),
        Vocabulary(slots=longer, num_ids=6, num_buckets=one.num_buckets, seed=one.seed),
    ]
    assert Vocabulary.build(GOLDEN_KEYS.copy()).digest == one.digest
    assert len({one.digest, *(other.digest for other in others)}) == 1 + len(others)


def test_unsigned_and_strided_keys() -> None:
    unsigned = np.array([2**64 - 1, 2**63, 5, 0], np.uint64)
    vocabulary = Vocabulary.build(unsigned)
    assert vocabulary.keys().tolist() == [-1, -(2**63), 5, 0]
    assert vocabulary.positions(unsigned).tolist() == [0, 1, 2, 3]
    assert vocabulary.positions(np.array([-1, 9, 5, 9, 4], np.int64)[::2]).tolist() == [0, 2, -1]
    assert Vocabulary.build(np.repeat(unsigned, 2)[::2]).digest == vocabulary.digest


def test_rows_into_a_given_array() -> None:
    vocabulary = Vocabulary.build(np.arange(100))
    out = np.full(50, -7)
    assert vocabulary.positions(np.arange(50) + 75, out) is out
    assert out.tolist() == [*range(75, 100), *[-1] * 25]
    keys = np.arange(50)
    for wrong in (np.empty(49, np.int64), np.empty(50, np.int32), keys):
        with pytest.raises(ConfigError, match=r"must be int64 \[50\] and not overlap keys"):
            vocabulary.positions(keys, wrong)
    for foreign in (np.zeros(3), np.zeros(3, np.int32), np.zeros((3, 1), np.int64)):
        with pytest.raises(ConfigError, match=r"must be int64 or uint64 \[N\]"):
            vocabulary.positions(foreign)
        with pytest.raises(ConfigError, match=r"must be int64 or uint64 \[N\]"):
            Vocabulary.build(foreign)


def test_an_empty_vocabulary_has_seen_nothing() -> None:
    empty = Vocabulary.build(np.empty(0, np.int64))
    assert (empty.num_ids, empty.keys().tolist(), empty.nbytes) == (0, [], 64)
    assert empty.positions(np.array(EXTREMES)).tolist() == [-1] * len(EXTREMES)
    assert empty.positions(np.empty(0, np.int64)).tolist() == []


@pytest.mark.parametrize("copies", [2, 2000])
def test_a_key_given_twice_is_named(copies: int) -> None:
    keys = np.concatenate([np.arange(1000), np.full(copies - 1, 77)])
    with pytest.raises(ConfigError, match="key 77 is given for the positions 77 and 1000"):
        Vocabulary.build(keys)
    with pytest.raises(ConfigError, match="num_threads=0"):
        Vocabulary.build(keys, num_threads=0)


def test_keys_that_collide_under_the_first_seeds_get_another() -> None:
    assert Vocabulary.build(crowd(512, 0)).seed == derive_seed("vocabulary", 0)
    keys = np.concatenate([crowd(513, 0), random_keys(1000)])
    vocabulary = Vocabulary.build(keys)
    assert vocabulary.seed == derive_seed("vocabulary", 1)
    np.testing.assert_array_equal(vocabulary.positions(keys), np.arange(len(keys)))
    both = Vocabulary.build(np.concatenate([crowd(100_000, 0), crowd(600, 1)]))
    assert both.seed == derive_seed("vocabulary", 2)


def test_keys_that_collide_under_every_seed_are_refused() -> None:
    keys = np.unique(np.concatenate([crowd(600, attempt) for attempt in range(8)]))
    with pytest.raises(ConfigError, match="under each of 8 seeds more than 512 of the 4800 keys lie in a row"):
        Vocabulary.build(keys)


def test_a_slice_of_a_larger_arrow_array_is_read_in_place() -> None:
    whole = Vocabulary.build(GOLDEN_KEYS)
    around = pa.concat_arrays([whole.slots.slice(0, 3), whole.slots, whole.slots.slice(0, 5)])
    sliced = Vocabulary(
        slots=around.slice(3, len(whole.slots)),
        num_ids=whole.num_ids,
        num_buckets=whole.num_buckets,
        seed=whole.seed,
    )
    assert sliced.digest == whole.digest
    assert sliced.nbytes == whole.nbytes
    assert sliced.positions(GOLDEN_KEYS).tolist() == list(range(6))
    assert sliced.keys().tolist() == GOLDEN_KEYS.tolist()


def test_a_memory_mapped_file_is_not_copied(tmp_path: Path) -> None:
    keys = random_keys(50_000)
    vocabulary = Vocabulary.build(keys)
    batch = pa.record_batch([vocabulary.slots], names=["slots"])
    with pa.ipc.new_file(str(tmp_path / "v.arrow"), batch.schema) as writer:
        writer.write_batch(batch)
    allocated = pa.total_allocated_bytes()
    slots = pa.ipc.open_file(pa.memory_map(str(tmp_path / "v.arrow"))).get_batch(0).column(0)
    mapped = Vocabulary(slots=slots, **vocabulary.header())
    np.testing.assert_array_equal(mapped.positions(keys), np.arange(len(keys)))
    assert mapped.digest == vocabulary.digest
    assert pa.total_allocated_bytes() - allocated < 4096


def test_slots_that_cannot_be_a_table_are_refused() -> None:
    good = Vocabulary.build(GOLDEN_KEYS)
    size = len(good.slots)

    def refused(message: str, slots: pa.Array = good.slots, **sizes: int) -> None:
        with pytest.raises(ConfigError, match=message):
            Vocabulary(slots=slots, **{**good.header(), **sizes})

    refused("list<item: int32>", pa.array([[1, 2]] * size, pa.list_(pa.int32(), 2)))
    refused("of type int64", pa.array([1] * size))
    refused("hold 1 nulls", pa.array([*good.slots.to_pylist()[:-1], None], pa.list_(pa.int64(), 2)))
    refused("hold 1 nulls", pa.array([*good.slots.to_pylist()[:-1], [0, None]], pa.list_(pa.int64(), 2)))
    refused("8 slots cannot be", good.slots.slice(0, 8))
    refused(f"{size + 1} slots cannot be", pa.concat_arrays([good.slots, good.slots.slice(size - 1)]))
    refused(f"{size} slots cannot be those of num_ids={size}", num_ids=size)
    refused("num_ids=-1", num_ids=-1)
    refused("num_buckets=0", num_buckets=0)
    refused(f"num_buckets={size // 4 + 1}", num_buckets=size // 4 + 1)
    refused("seed=-1", seed=-1)
    refused("last slot has position 3", pa.array([*good.slots.to_pylist()[:-1], [0, 3]], pa.list_(pa.int64(), 2)))


def test_damaged_slots_give_no_keys() -> None:
    good = Vocabulary.build(GOLDEN_KEYS)
    flat = good.slots_view.copy()
    flat[flat[:, 1] == 5, 1] = 8
    for slots, num_ids in ((good.slots, 5), (good.slots, 7), (pa.array(flat.reshape(-1)), 6)):
        lists = slots if slots is good.slots else pa.FixedSizeListArray.from_arrays(slots, type=good.slots.type)
        damaged = Vocabulary(slots=lists, num_ids=num_ids, num_buckets=good.num_buckets, seed=good.seed)
        with pytest.raises(ConfigError, match=rf"do not hold the positions 0\.\.{num_ids - 1};"):
            damaged.keys()


def test_copies_share_and_pickles_hold_the_slots_once() -> None:
    one = Vocabulary.build(random_keys(50_000))
    assert copy.deepcopy(one) is one
    assert one.positions(np.array([1])).tolist() == [-1]
    pickled = pickle.dumps(one)
    assert len(pickled) < 1.1 * one.nbytes
    assert pickle.loads(pickled).digest == one.digest
