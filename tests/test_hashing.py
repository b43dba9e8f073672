"""The hash: golden values, equal bits in numpy, numba and torch, and the statistics that CE relies on."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from torchrec_cce.clustering.entropy import pointer_entropies, random_entropies
from torchrec_cce.errors import ConfigError
from torchrec_cce.hashing import UniversalHash, derive_seed, hash_one
from torchrec_cce.methods.tensor_hash import TensorHash

INT64 = np.iinfo(np.int64)
ids_strategy = st.lists(st.integers(INT64.min, INT64.max), min_size=1, max_size=50)
rows_strategy = st.one_of(st.integers(1, 2**32), st.sampled_from([1, 2, 2**8, 2**16, 2**31, 2**31 + 1, 2**32]))


def exact(x: int, a: int, b: int, k: int) -> int:
    """The definition, in Python's integers."""
    x %= 2**64
    x = ((x ^ (x >> 33)) * 0xFF51AFD7ED558CCD) % 2**64
    x = ((x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53) % 2**64
    x ^= x >> 33
    return ((((a * x + b) % 2**64) >> 32) * k) >> 32


@given(ids=ids_strategy, num_rows=rows_strategy, seed=st.integers(0, 2**63 - 1))
def test_numpy_numba_and_torch_give_the_definition(ids: list[int], num_rows: int, seed: int) -> None:
    functions = UniversalHash.from_seed(seed, num_columns=3, num_rows=num_rows)
    expected = [
        [exact(x, int(a), int(b), num_rows) for a, b in zip(functions.multipliers, functions.offsets, strict=True)]
        for x in ids
    ]
    array = np.array(ids, dtype=np.int64)
    assert functions.numpy(array).tolist() == expected
    assert TensorHash(functions)(torch.from_numpy(array)).tolist() == expected
    compiled = [
        [
            int(hash_one(x, a, b, np.uint64(num_rows)))
            for a, b in zip(functions.multipliers, functions.offsets, strict=True)
        ]
        for x in array.view(np.uint64)
    ]
    assert compiled == expected


def test_golden_values() -> None:
    """Published maps depend on these: they never change."""
    functions = UniversalHash.from_seed(1, num_columns=2, num_rows=1000)
    ids = np.array([0, 1, 2, -1, INT64.max, INT64.min, 10**12])
    assert functions.multipliers.tolist() == [12658959682189252121, 16995436077321108773]
    assert functions.numpy(ids).tolist() == [
        [326, 714],
        [745, 735],
        [332, 751],
        [607, 908],
        [346, 309],
        [975, 657],
        [691, 655],
    ]
    assert derive_seed(7, "t_user", "helper", 3) == 1179402501459983559
    assert derive_seed("1") != derive_seed(1)


KINDS = ["random", "sequential", "multiples of 2^20", "multiples of 2^32", "negative", "two halves"]


def structured_ids(kind: str, count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return {
        "random": rng.integers(INT64.min, INT64.max, count),
        "sequential": np.arange(count),
        "multiples of 2^20": np.arange(count) << 20,
        "multiples of 2^32": np.arange(count) << 32,
        "negative": -np.arange(1, count + 1),
        "two halves": (np.arange(count) % 256 << 40) + np.arange(count) // 256,
    }[kind]


@pytest.mark.parametrize("num_rows", [7, 250, 4096, 50_000])
def test_chi_square_of_random_ids(num_rows: int) -> None:
    """Neither too uneven nor too even: both tails, at one in a million each."""
    ids = structured_ids("random", 1_000_000)
    for rows in UniversalHash.from_seed(3, num_columns=4, num_rows=num_rows).numpy(ids).T:
        counts = np.bincount(rows, minlength=num_rows)
        statistic = ((counts - len(ids) / num_rows) ** 2).sum() / (len(ids) / num_rows)
        assert chi2.ppf(1e-6, num_rows - 1) < statistic < chi2.isf(1e-6, num_rows - 1)


@pytest.mark.parametrize("num_rows", [64, 250])
@pytest.mark.parametrize("kind", KINDS)
def test_pairs_collide_no_more_than_universality_allows(kind: str, num_rows: int) -> None:
    """Over many functions, a pair of different IDs collides at a rate of at most 2/k (plus five standard errors)."""
    num_functions, num_pairs = 2000, 200
    ids = structured_ids(kind, 2 * num_pairs)
    rows = UniversalHash.from_seed(11, num_columns=num_functions, num_rows=num_rows).numpy(ids)
    rates = (rows[:num_pairs] == rows[num_pairs:]).mean(axis=1)
    bound = 2 / num_rows
    assert rates.max() <= bound + 5 * np.sqrt(bound / num_functions)
    assert rates.mean() > 0.2 / num_rows  # a test that cannot fail would pass a hash that never collides


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_pairwise_independent(kind: str) -> None:
    """The joint histogram of two columns is that of independent hashes (chi-square, one in a million)."""
    k = 32
    rows = UniversalHash.from_seed(5, num_columns=4, num_rows=k).numpy(structured_ids(kind, 500_000))
    for i in range(4):
        for j in range(i):
            counts = np.bincount(rows[:, i] * k + rows[:, j], minlength=k * k)
            expected = len(rows) / k**2
            assert ((counts - expected) ** 2).sum() / expected < chi2.isf(1e-6, k * k - 1)


def test_dense_ids_have_the_entropies_of_random_pointers() -> None:
    """Under every one of 30 seeds; without mixing, H2 of one of them is 1.8 below."""
    ids = np.arange(35_105)  # as many as Gowalla has users
    for seed in range(30):
        pointers = UniversalHash.from_seed(seed, num_columns=4, num_rows=250).numpy(ids).astype(np.uint8)
        found = pointer_entropies(pointers, 250)
        np.testing.assert_allclose(found, random_entropies(len(ids), 250, 4), atol=0.02)


@pytest.mark.parametrize("num_rows", [0, -1, 2**32 + 1])
def test_range_is_checked(num_rows: int) -> None:
    with pytest.raises(ConfigError, match=str(num_rows)):
        UniversalHash.from_seed(0, num_columns=1, num_rows=num_rows)
