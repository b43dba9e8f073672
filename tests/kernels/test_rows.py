"""The remap's loops against plain numpy, and their bounds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.kernel_references import reference_coded_rows, reference_partly_clustered_rows, reference_rows
from torchrec_cce.hashing import UniversalHash
from torchrec_cce.kernels.rows import (
    clustered_rows,
    coded_rows,
    hashed_rows,
    helper_rows,
    identity_rows,
    partly_clustered_rows,
)

sizes = st.tuples(st.integers(1, 300), st.integers(0, 90), st.integers(1, 8), st.integers(1, 70_000))


@given(sizes=sizes, num_terms=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_hashed_rows_equal_the_reference(sizes: tuple[int, int, int, int], num_terms: int, seed: int) -> None:
    num_ids, count, num_columns, num_rows = sizes
    ids = np.random.default_rng(seed).integers(0, num_ids, count)
    hashes = UniversalHash.from_seed(seed, num_columns=num_columns * num_terms, num_rows=num_rows)
    out = np.full((num_columns, count, num_terms), -7)
    assert hashed_rows(ids, num_ids, hashes.multipliers, hashes.offsets, num_rows, out) == -1
    np.testing.assert_array_equal(out, reference_rows(ids, None, hashes, num_terms))


@given(sizes=sizes, dtype=st.sampled_from([np.uint8, np.uint16, np.uint32]), seed=st.integers(0, 2**32))
def test_clustered_rows_equal_the_reference(sizes: tuple[int, int, int, int], dtype: type, seed: int) -> None:
    num_ids, count, num_columns, num_rows = sizes
    num_rows = min(num_rows, np.iinfo(dtype).max + 1)
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, num_ids, count)
    pointers = rng.integers(0, num_rows, (num_ids, num_columns)).astype(dtype)
    hashes = UniversalHash.from_seed(seed, num_columns=num_columns, num_rows=num_rows)
    out = np.full((num_columns, count, 2), -7)
    assert clustered_rows(ids, pointers, hashes.multipliers, hashes.offsets, num_rows, out) == -1
    np.testing.assert_array_equal(out, reference_rows(ids, pointers, hashes, 2))
    without_helper = np.full((num_columns, count, 1), -7)
    assert clustered_rows(ids, pointers, hashes.multipliers, hashes.offsets, num_rows, without_helper) == -1
    np.testing.assert_array_equal(without_helper, out[:, :, :1])


@given(sizes=sizes, dtype=st.sampled_from([np.uint8, np.uint16, np.uint32]), seed=st.integers(0, 2**32))
def test_rows_of_given_codes_equal_the_reference(sizes: tuple[int, int, int, int], dtype: type, seed: int) -> None:
    """Codes with others beside them, as in padded words, and helper codes that are given or hashed."""
    padding, count, num_columns, num_rows = sizes
    num_rows = min(num_rows, np.iinfo(dtype).max + 1)
    rng = np.random.default_rng(seed)
    codebook, helper = (rng.integers(0, num_rows, (count, num_columns + padding % 5)).astype(dtype) for _ in range(2))
    ids = rng.integers(-(2**63), 2**63 - 1, count)
    hashes = UniversalHash.from_seed(seed, num_columns=num_columns, num_rows=num_rows)
    out = np.full((num_columns, count, 2), -7)
    coded_rows(codebook, num_rows, 0, out)
    coded_rows(helper, num_rows, 1, out)
    first, second = codebook[:, :num_columns], helper[:, :num_columns]
    np.testing.assert_array_equal(out, reference_coded_rows([first, second], num_rows))
    helper_rows(ids, hashes.multipliers, hashes.offsets, num_rows, out)
    np.testing.assert_array_equal(out, reference_coded_rows([first, hashes.numpy(ids)], num_rows))
    alone = np.full((num_columns, count, 1), -7)
    coded_rows(codebook, num_rows, 0, alone)
    np.testing.assert_array_equal(alone, reference_coded_rows([first], num_rows))


@given(sizes=sizes, dtype=st.sampled_from([np.uint8, np.uint16, np.uint32]), seed=st.integers(0, 2**32))
def test_partly_clustered_rows_equal_the_reference(sizes: tuple[int, int, int, int], dtype: type, seed: int) -> None:
    """Some IDs without a row, and any 64-bit IDs."""
    map_size, count, num_columns, num_rows = sizes
    num_rows = min(num_rows, np.iinfo(dtype).max + 1)
    rng = np.random.default_rng(seed)
    ids = rng.integers(-(2**63), 2**63 - 1, count)
    positions = rng.integers(-1, map_size, count)
    pointers = rng.integers(0, num_rows, (map_size, num_columns)).astype(dtype)
    codebook, helper = (UniversalHash.from_seed(seed + i, num_columns=num_columns, num_rows=num_rows) for i in (0, 1))
    functions = (codebook.multipliers, codebook.offsets, helper.multipliers, helper.offsets)
    out = np.full((num_columns, count, 2), -7)
    partly_clustered_rows(ids, positions, pointers, *functions, num_rows, out)
    np.testing.assert_array_equal(out, reference_partly_clustered_rows(ids, positions, pointers, codebook, helper))
    without_helper = np.full((num_columns, count, 1), -7)
    partly_clustered_rows(ids, positions, pointers, *functions, num_rows, without_helper)
    np.testing.assert_array_equal(without_helper, out[:, :, :1])
    wild = np.where(positions < 0, map_size + 3, positions)
    partly_clustered_rows(ids, wild, pointers, *functions, num_rows, out)
    np.testing.assert_array_equal(out, reference_partly_clustered_rows(ids, positions, pointers, codebook, helper))


@given(sizes=sizes, num_terms=st.integers(1, 2), seed=st.integers(0, 2**32))
def test_two_codes_in_a_byte_give_the_rows_of_two_bytes(
    sizes: tuple[int, int, int, int], num_terms: int, seed: int
) -> None:
    """By all three loops that read codes; some IDs are not in the map."""
    map_size, count, num_columns, num_rows = sizes
    num_rows = min(num_rows, 16)
    rng = np.random.default_rng(seed)
    pointers = rng.integers(0, num_rows, (map_size, num_columns)).astype(np.uint8)
    padded = np.pad(pointers, ((0, 0), (0, num_columns % 2)))
    halves = padded[:, 0::2] | padded[:, 1::2] << 4
    codebook, helper = (UniversalHash.from_seed(seed + i, num_columns=num_columns, num_rows=num_rows) for i in (0, 1))
    ids, positions = rng.integers(-1, map_size + 1, count), rng.integers(-1, map_size, count)
    found, expected = (np.full((num_columns, count, num_terms), -7) for _ in range(2))
    hashes = (helper.multipliers, helper.offsets)
    bad = clustered_rows(ids, halves, *hashes, num_rows, found, True)
    assert bad == clustered_rows(ids, pointers, *hashes, num_rows, expected)
    np.testing.assert_array_equal(found, expected)
    both = (codebook.multipliers, codebook.offsets, *hashes)
    partly_clustered_rows(ids, positions, halves, *both, num_rows, found, True)
    partly_clustered_rows(ids, positions, pointers, *both, num_rows, expected)
    np.testing.assert_array_equal(found, expected)
    given_codes = halves[positions], pointers[positions]
    coded_rows(given_codes[0], num_rows, num_terms - 1, found, True)
    coded_rows(given_codes[1], num_rows, num_terms - 1, expected)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("bad_id", [-1, 100, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("position", [0, 17, 39])
def test_first_id_outside_is_reported_and_nothing_is_read_for_it(bad_id: int, position: int) -> None:
    ids = np.arange(40)
    ids[position] = bad_id
    ids[39] = -5
    hashes = UniversalHash.from_seed(0, num_columns=2, num_rows=10)
    pointers = np.zeros((100, 2), np.uint8)
    out = np.empty((2, 40, 2), np.int64)
    assert clustered_rows(ids, pointers, hashes.multipliers, hashes.offsets, 10, out) == position
    assert out.min() >= 0
    assert out.max() < 40
    assert hashed_rows(ids, 100, hashes.multipliers, hashes.offsets, 10, out[:1]) == position
    full = np.empty((1, 40, 1), np.int64)
    assert identity_rows(ids, 100, full) == position
    assert full.min() >= 0
    assert full.max() < 100


def test_identity_rows() -> None:
    ids = np.array([3, 0, 9])
    out = np.empty((1, 3, 1), np.int64)
    assert identity_rows(ids, 10, out) == -1
    assert out.reshape(-1).tolist() == [3, 0, 9]
