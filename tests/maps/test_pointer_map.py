"""Maps: sizes, digests, generations, raw IDs."""

import copy
import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.method_references import cce_codes
from torchrec_cce.errors import ConfigError, MapMismatchError
from torchrec_cce.maps.pointer_map import PointerMap, Unseen
from torchrec_cce.maps.vocabulary import Vocabulary


def hashed(num_ids: int = 1000, seed: int = 3) -> PointerMap:
    return PointerMap.hashed(num_ids=num_ids, num_columns=4, num_rows=50, seed=seed)


def clustered(dtype: type = np.uint8) -> PointerMap:
    start = hashed()
    pointers = np.random.default_rng(0).integers(0, 50, (1000, 4)).astype(dtype)
    return start.clustered(pointers, start.next_helper_hash(1))


def test_unclustered_map_computes_its_pointers() -> None:
    pointer_map = hashed()
    assert pointer_map.nbytes == 0
    assert isinstance(pointer_map.pointers, pa.FixedSizeListArray)
    codes = pointer_map.codes(np.arange(1000))
    assert codes.shape == (4, 2, 1000)
    np.testing.assert_array_equal(pointer_map.pointers.values.to_numpy().reshape(1000, 4).T, codes[:, 0])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_clustered_map_stores_its_pointers(dtype: type) -> None:
    pointer_map = clustered(dtype)
    assert pointer_map.generation == 1
    assert pointer_map.nbytes == 4000 * np.dtype(dtype).itemsize
    assert pointer_map.stored_view.dtype == dtype
    np.testing.assert_array_equal(pointer_map.codes(np.arange(1000))[:, 0].T, pointer_map.stored_view)


def test_every_generation_has_a_fresh_helper_hash() -> None:
    first = hashed()
    second = first.clustered(clustered().stored_view, first.next_helper_hash(1))
    third = second.clustered(second.stored_view, second.next_helper_hash(1))
    helpers = {m.helper_hash.multipliers.tobytes() for m in (first, second, third)}
    assert len(helpers) == 3


def test_digest_covers_all_that_decides_a_lookup() -> None:
    one = clustered()
    same = hashed().clustered(one.stored_view.copy(), one.helper_hash)
    flipped = one.stored_view.copy()
    flipped[999, 3] ^= 1
    others = [
        hashed(),
        hashed(seed=4),
        hashed(num_ids=1001),
        hashed().clustered(flipped, one.helper_hash),
        hashed().clustered(one.stored_view, hashed().next_helper_hash(2)),
        clustered(np.uint16),
    ]
    assert one.digest == same.digest
    assert len({one.digest, *(m.digest for m in others)}) == 1 + len(others)


def test_a_slice_of_a_larger_arrow_array_is_read_in_place() -> None:
    flat = pa.array(np.arange(40, dtype=np.uint8))
    stored = pa.FixedSizeListArray.from_arrays(flat, 4)[3:8]
    base = PointerMap.hashed(num_ids=5, num_columns=4, num_rows=50, seed=0)
    sliced = PointerMap(num_ids=5, codebook_hash=base.codebook_hash, helper_hash=base.helper_hash, stored=stored)
    assert sliced.stored_view[0].tolist() == [12, 13, 14, 15]


def test_wrong_pointers_are_refused() -> None:
    start = hashed()
    with pytest.raises(ConfigError, match=r"50 is not in 0\.\.49"):
        start.clustered(np.full((1000, 4), 50, np.uint8), start.helper_hash)
    with pytest.raises(ConfigError, match="length 999"):
        start.clustered(np.zeros((999, 4), np.uint8), start.helper_hash)
    with pytest.raises(MapMismatchError, match=r"1000 IDs, 4 columns, 50 rows.* 7 IDs"):
        PointerMap.hashed(num_ids=7, num_columns=4, num_rows=50, seed=0).check_sizes(
            table="t", num_ids=1000, num_columns=4, num_rows=50
        )


def test_copies_share_and_pickles_keep_a_map() -> None:
    one = clustered()
    assert copy.deepcopy(one) is one
    assert pickle.loads(pickle.dumps(one)).digest == one.digest


def test_unknown_raw_ids_have_no_position() -> None:
    ids = np.array([-1, 0, 999, 1000, 2**62])
    assert hashed().positions(ids).tolist() == [-1, 0, 999, -1, -1]
    keyed = hashed().with_vocabulary(Vocabulary.build(np.array([2**62, -1])))
    assert (keyed.num_ids, keyed.unseen) == (2, "hash")
    assert keyed.positions(ids).tolist() == [1, -1, -1, -1, 0]
    assert keyed.raw_ids(np.array([1, 0])).tolist() == [-1, 2**62]
    assert keyed.first_id == 2**62
    assert keyed.nbytes == keyed.vocabulary.nbytes


@given(
    old=st.sets(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=30),
    new=st.sets(st.integers(-(2**63), 2**63 - 1), max_size=30),
    clusterings=st.integers(0, 2),
)
def test_a_grown_vocabulary_changes_no_embedding(old: set[int], new: set[int], clusterings: int) -> None:
    """What an ID looked up before, known or unseen, it looks up after."""
    before = hashed().with_vocabulary(Vocabulary.build(np.array(sorted(old))))
    rng = np.random.default_rng(0)
    for _ in range(clusterings):
        pointers = rng.integers(0, 50, (len(old), 4)).astype(np.uint8)
        before = before.clustered(pointers, before.next_helper_hash(1))
    keys = np.array(sorted(old | new)[::-1])
    after = before.with_vocabulary(Vocabulary.build(keys))
    assert after.generation == before.generation
    for raw_id in keys.tolist():
        assert cce_codes(after, raw_id) == cce_codes(before, raw_id)


@pytest.mark.parametrize("is_clustered", [False, True])
@pytest.mark.parametrize("unseen", ["error", "hash", "first_row"])
def test_codes_of_any_id(unseen: Unseen, is_clustered: bool) -> None:
    """By the policy, one ID at a time; where that is an error, as under "hash"."""
    keys = [5, -1, 2**62, 0]
    one = hashed().with_vocabulary(Vocabulary.build(np.array(keys)), unseen=unseen)
    if is_clustered:
        one = one.clustered(np.arange(16, dtype=np.uint8).reshape(4, 4), one.next_helper_hash(1))
    ids = np.array([0, 7, 5, -(2**63), -1, 7])
    plain = []
    for raw_id in ids.tolist():
        known = raw_id if raw_id in keys or unseen != "first_row" else keys[0]
        codebook, helper = (hash_of.numpy(np.array([known]))[0] for hash_of in (one.codebook_hash, one.helper_hash))
        stored = is_clustered and known in keys
        plain.append([one.stored_view[keys.index(known)] if stored else codebook, helper])
    np.testing.assert_array_equal(one.codes_of_any(ids), np.array(plain).transpose(2, 1, 0))
    assert one.resolve(ids).unseen.tolist() == [False, True, False, True, False, True]
    assert one.resolve(np.array(keys)).unseen is None
    nothing = 0 if unseen == "first_row" else -1
    assert one.resolve(ids).positions.tolist() == [3, nothing, 0, nothing, 1, nothing]
    assert one.codes_of_any(np.array([], np.int64)).shape == (4, 2, 0)


def test_what_does_not_fit_together() -> None:
    vocabulary = Vocabulary.build(np.arange(3))
    with pytest.raises(ConfigError, match="a vocabulary of 3 keys is not that of 4 IDs"):
        PointerMap.hashed(num_ids=4, num_columns=4, num_rows=50, seed=0, vocabulary=vocabulary)
    with pytest.raises(ConfigError, match="unseen='ignore' is not one of error, hash, first_row"):
        PointerMap.hashed(num_ids=4, num_columns=4, num_rows=50, seed=0, unseen="ignore")  # type: ignore[arg-type]
    nothing = Vocabulary.build(np.zeros(0, np.int64))
    with pytest.raises(ConfigError, match="at least one raw ID"):
        hashed().with_vocabulary(nothing, unseen="first_row")


def test_the_digest_covers_vocabulary_and_policy() -> None:
    keyed = [hashed().with_vocabulary(Vocabulary.build(np.array(keys))) for keys in ([1, 2], [2, 1], [1, 3])]
    loose = hashed().with_vocabulary(keyed[0].vocabulary, unseen="error")
    assert len({m.digest for m in (*keyed, loose, hashed())}) == 5
    assert keyed[0].digest == hashed().with_vocabulary(Vocabulary.build(np.array([1, 2]))).digest


@pytest.mark.parametrize(("num_columns", "dtype"), [(4, np.uint16), (3, np.uint8), (8, np.uint16), (1, np.uint32)])
def test_raw_ids_have_the_pointers_of_their_positions(num_columns: int, dtype: type) -> None:
    keys = np.random.default_rng(0).permutation(10**6)[:500] - 5000
    start = PointerMap.hashed(num_ids=500, num_columns=num_columns, num_rows=50, seed=0)
    pointers = np.random.default_rng(1).integers(0, 50, (500, num_columns)).astype(dtype)
    dense = start.clustered(pointers, start.helper_hash)
    keyed = start.with_vocabulary(Vocabulary.build(keys)).clustered(pointers, start.helper_hash)
    rows = np.random.default_rng(2).integers(0, 500, 300)
    for one, ids in ((dense, rows), (keyed, keys[rows])):
        np.testing.assert_array_equal(one.codebook_codes(one.positions(ids)), pointers[rows])
