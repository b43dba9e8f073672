"""Pointers of 4 bits: against Python's arithmetic, and maps of them against maps of bytes with the same codes."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_cce.clustering.entropy import pointer_entropies
from torchrec_cce.errors import ConfigError
from torchrec_cce.maps.pointer_format import CODES_AT_A_TIME, PointerFormat
from torchrec_cce.maps.pointer_map import PointerMap, Unseen
from torchrec_cce.maps.snapshot import TableSnapshot, churn
from torchrec_cce.maps.vocabulary import Vocabulary

NUM_IDS = 200
COLUMNS = (2, 3, 5, 8, 16, 17, 32)


def codes_of(num_ids: int, num_columns: int, num_rows: int = 16, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, num_rows, (num_ids, num_columns)).astype(np.uint8)


def of_4_bits(num_columns: int) -> PointerFormat:
    return PointerFormat(num_columns=num_columns, bits=4)


@pytest.mark.parametrize(
    ("num_rows", "num_columns", "least", "bits", "num_bytes"),
    [
        (16, 16, 4, 4, 8),
        (2, 3, 4, 4, 2),
        (1, 2, 4, 4, 1),
        (16, 1, 4, 8, 1),  # a byte in any case
        (17, 4, 4, 8, 4),
        (16, 4, 8, 8, 4),
        (256, 4, 4, 8, 4),
        (257, 4, 8, 16, 8),
        (65537, 3, 4, 32, 12),
    ],
)
def test_the_fewest_bits(num_rows: int, num_columns: int, least: object, bits: int, num_bytes: int) -> None:
    form = PointerFormat.that_holds(num_rows, num_columns=num_columns, min_bits=least)  # type: ignore[arg-type]
    assert (form.bits, form.num_bytes) == (bits, num_bytes)
    assert PointerFormat.named(form.name, num_columns=num_columns) == form
    assert PointerFormat.of_type(form.arrow_type, num_columns=num_columns) == form


def test_formats_that_are_none() -> None:
    with pytest.raises(ConfigError, match="no pointers are of 4 bits in 1 columns"):
        of_4_bits(1)
    with pytest.raises(ConfigError, match="no pointers are of 6 bits in 4 columns"):
        PointerFormat(num_columns=4, bits=6)
    for kind in (pa.list_(pa.uint8(), 3), pa.list_(pa.int8(), 4), pa.list_(pa.uint64(), 4), pa.list_(pa.uint16(), 2)):
        assert PointerFormat.of_type(kind, num_columns=4) is None


@given(num_columns=st.integers(2, 32), count=st.integers(0, 9), seed=st.integers(0, 2**32 - 1))
def test_two_codes_are_in_a_byte(num_columns: int, count: int, seed: int) -> None:
    form, codes = of_4_bits(num_columns), codes_of(count, num_columns, seed=seed)
    stored = form.encode(codes.astype(np.int64))
    assert stored.dtype == np.uint8
    padded = [[*row, 0] for row in codes.tolist()]
    assert stored.tolist() == [[row[j] + 16 * row[j + 1] for j in range(0, num_columns, 2)] for row in padded]
    np.testing.assert_array_equal(form.decode(stored), codes)
    view = form.codes(stored)
    assert (view.shape, view.dtype) == (codes.shape, codes.dtype)
    np.testing.assert_array_equal(view[1:5], codes[1:5])
    for column in range(num_columns):
        np.testing.assert_array_equal(view[: count // 2, column], codes[: count // 2, column])
    if count:
        assert view.max() == codes.max()


@pytest.mark.parametrize("num_ids", [0, 1, CODES_AT_A_TIME, CODES_AT_A_TIME + 1])
@pytest.mark.parametrize("bits", [4, 8])
def test_parts_are_filled_one_after_the_other(num_ids: int, bits: int) -> None:
    form, codes = PointerFormat(num_columns=3, bits=bits), codes_of(num_ids, 3)
    stored = np.full((num_ids, form.width), 255, np.uint8)
    sizes = []
    for first, part in form.parts_to_fill(stored):
        part[:] = codes[first : first + len(part)]
        sizes.append(len(part))
    assert sum(sizes) == num_ids
    assert len(sizes) == (2 if bits == 4 and num_ids > CODES_AT_A_TIME else 1)
    np.testing.assert_array_equal(stored, form.encode(codes))


@pytest.mark.parametrize("num_columns", [2, 5, 16])
def test_entropies_are_those_of_the_codes(num_columns: int) -> None:
    codes = codes_of(3000, num_columns)
    form = of_4_bits(num_columns)
    assert pointer_entropies(form.codes(form.encode(codes)), 16) == pointer_entropies(codes, 16)
    with pytest.raises(ConfigError, match="pointer 15 is not below num_rows=9"):
        pointer_entropies(form.codes(form.encode(codes)), 9)


def both_maps(
    num_columns: int, num_rows: int, *, unseen: Unseen = "error", keys: bool = False
) -> tuple[PointerMap, PointerMap]:
    """Of the same codes, in 4 bits and in 8."""
    start = PointerMap.hashed(num_ids=NUM_IDS, num_columns=num_columns, num_rows=num_rows, seed=3)
    start = replace(start, unseen=unseen)
    if keys:
        raw = np.random.default_rng(1).integers(-(2**63), 2**63, NUM_IDS)
        start = start.with_vocabulary(Vocabulary.build(raw), unseen=unseen)
    codes = codes_of(NUM_IDS, num_columns, num_rows)
    helper_hash = start.next_helper_hash(1)
    return start.clustered(of_4_bits(num_columns).encode(codes), helper_hash), start.clustered(codes, helper_hash)


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("unseen", ["error", "hash", "first_row"])
@pytest.mark.parametrize("num_rows", [2, 11, 16])
@pytest.mark.parametrize("num_columns", COLUMNS)
def test_a_map_of_4_bits_looks_up_what_one_of_bytes_does(
    num_columns: int, num_rows: int, unseen: Unseen, keys: bool
) -> None:
    small, plain = both_maps(num_columns, num_rows, unseen=unseen, keys=keys)
    assert (small.pointer_format.name, plain.pointer_format.name) == ("uint4", "uint8")
    vocabulary_bytes = 0 if small.vocabulary is None else small.vocabulary.nbytes
    assert small.nbytes - vocabulary_bytes == NUM_IDS * -(-num_columns // 2)
    assert small.pointers.equals(plain.pointers)
    everything = np.arange(NUM_IDS)
    np.testing.assert_array_equal(small.learned_codes[everything], plain.stored_view)
    np.testing.assert_array_equal(small.codes(everything), plain.codes(everything))

    rng = np.random.default_rng(2)
    known = plain.raw_ids(rng.integers(0, NUM_IDS, 300))
    unknown = rng.integers(-(2**63), 2**63, 20)
    for ids in (known, np.concatenate([known, unknown, known[:5]]), known[:0]):
        for terms in (1, 2):
            rows = [np.zeros((num_columns, len(ids), terms), np.int64) for _ in range(2)]
            found, expected = (one.rows_into(ids, out) for one, out in zip((small, plain), rows, strict=True))
            assert (found.bad, found.num_unseen) == (expected.bad, expected.num_unseen)
            if found.bad < 0:
                np.testing.assert_array_equal(*rows)
        np.testing.assert_array_equal(small.codes_of_any(ids), plain.codes_of_any(ids))
        for form in (small.word_format, plain.word_format):
            words, looked = small.uint64s(ids, form, helper=True)
            wanted, _ = plain.uint64s(ids, form, helper=True)
            if looked.bad < 0:
                np.testing.assert_array_equal(words, wanted)
    assert small.word_format.bits == 4
    assert plain.word_format.bits == 8

    with_others = Vocabulary.build(np.unique(np.concatenate([plain.raw_ids(everything), unknown])))
    grown, grown_plain = (one.with_vocabulary(with_others) for one in (small, plain))
    assert grown.pointer_format.bits == 4
    assert grown.pointers.equals(grown_plain.pointers)


@pytest.mark.parametrize("num_columns", [3, 4])
def test_what_tells_them_apart(num_columns: int) -> None:
    small, plain = both_maps(num_columns, 16)
    assert small.header() == {**plain.header(), "pointer_dtype": "uint4"}
    assert small.digest != plain.digest
    again, _ = both_maps(num_columns, 16)
    assert small.digest == again.digest
    changed = small.stored_view.copy()
    changed[7, 0] ^= 16
    assert replace(small, stored=pa.FixedSizeListArray.from_arrays(changed.reshape(-1), changed.shape[1])).digest != (
        small.digest
    )
    small.check_sizes(table="t", num_ids=NUM_IDS, num_columns=num_columns, num_rows=16)


def test_churn_counts_codes() -> None:
    small, plain = both_maps(5, 16)
    codes = plain.stored_view.copy()
    codes[3, 4] ^= 1
    codes[9, 0] ^= 1
    other = small.clustered(of_4_bits(5).encode(codes), small.helper_hash)
    tables = [
        TableSnapshot(pointer_map=one, num_embeddings=NUM_IDS, embedding_dim=5, feature_names=("a",), pooling="sum")
        for one in (small, plain, other)
    ]
    for old, new, changed in ((0, 1, 0), (1, 0, 0), (0, 2, 2), (1, 2, 2)):
        found = churn(tables[old], tables[new])
        assert found is not None
        assert found.share_changed == changed / (5 * NUM_IDS)


def test_wrong_pointers_are_refused() -> None:
    start = PointerMap.hashed(num_ids=3, num_columns=4, num_rows=9, seed=0)
    for stored in (np.array([[0, 0x90]] * 3), np.array([[9, 0]] * 3)):
        with pytest.raises(ConfigError, match=r"pointer 9 is not in 0\.\.8"):
            start.clustered(stored.astype(np.uint8), start.helper_hash)
    with pytest.raises(ConfigError, match="are not those of 3 IDs in 4 columns"):
        start.clustered(np.zeros((3, 3), np.uint8), start.helper_hash)
    with pytest.raises(ConfigError, match="are not those of 3 IDs in 4 columns"):
        start.clustered(np.zeros((3, 2), np.uint16), start.helper_hash)
