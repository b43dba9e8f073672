"""The entropies of pointers, and what they would be of random ones."""

import math
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_cce.clustering import entropy
from torchrec_cce.clustering.entropy import pointer_entropies, random_entropies
from torchrec_cce.errors import ConfigError


def joint_entropy(pointers: npt.NDArray[np.unsignedinteger]) -> float:
    counts = np.unique(pointers, axis=0, return_counts=True)[1] / len(pointers)
    return float(-np.sum(counts * np.log(counts)))


def plain_entropies(pointers: npt.NDArray[np.unsignedinteger]) -> list[float]:
    columns = range(pointers.shape[1])
    return [
        min(joint_entropy(pointers[:, list(subset)]) for subset in combinations(columns, size))
        for size in range(1, len(columns) + 1)
    ]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    num_ids=st.integers(1, 300),
    num_columns=st.integers(1, 4),
    num_rows=st.integers(1, 20),
    dtype=st.sampled_from([np.uint8, np.uint16, np.uint32, np.uint64]),
)
def test_matches_every_subset(seed: int, num_ids: int, num_columns: int, num_rows: int, dtype: type) -> None:
    pointers = np.random.default_rng(seed).integers(0, num_rows, (num_ids, num_columns)).astype(dtype)
    found = pointer_entropies(pointers, num_rows)
    assert found == pytest.approx(plain_entropies(pointers), abs=1e-9)
    assert list(found) == sorted(found)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32), num_columns=st.integers(5, 7), num_rows=st.integers(1, 6))
def test_many_columns_are_exact_to_pairs_and_bounded_beyond(seed: int, num_columns: int, num_rows: int) -> None:
    pointers = np.random.default_rng(seed).integers(0, num_rows, (200, num_columns)).astype(np.uint8)
    found = pointer_entropies(pointers, num_rows)
    exact = plain_entropies(pointers)
    assert found[:2] == pytest.approx(exact[:2], abs=1e-9)
    assert found[-1] == pytest.approx(exact[-1], abs=1e-9)
    for chain, minimum in zip(found, exact, strict=True):
        assert chain >= minimum - 1e-9
    assert list(found) == sorted(found)


def test_large_tables_need_more_than_63_bits_for_a_joint_key() -> None:
    rng = np.random.default_rng(0)
    few = rng.integers(0, 2**32, 5).astype(np.uint32)
    pointers = few[rng.integers(0, 5, (500, 4))]
    pointers[0] = np.iinfo(np.uint32).max - 1
    small = np.unique(pointers, return_inverse=True)[1].reshape(pointers.shape).astype(np.uint8)
    # H1 over 2^32 rows would need 32 GiB of counts: the joint ones alone are compared.
    columns = [entropy._Cells.of(pointers[:, column].astype(np.int64), 2**32) for column in range(4)]
    assert list(entropy._all_subsets(columns)) == pytest.approx(plain_entropies(small)[1:])
    assert next(iter(entropy._greedy_subsets(columns))) == pytest.approx(plain_entropies(small)[1])


def test_equal_columns_add_nothing() -> None:
    column = np.random.default_rng(0).integers(0, 50, 10_000).astype(np.uint16)
    found = pointer_entropies(np.stack([column] * 6, axis=1), 50)
    assert found == pytest.approx([found[0]] * 6)


def test_collapse_is_zero() -> None:
    assert pointer_entropies(np.full((100, 5), 3, np.uint8), 10) == (0,) * 5


def test_distinct_ids_are_log_n() -> None:
    ids = np.arange(5000)
    pointers = np.stack([ids % 100, ids // 100, ids % 97, ids % 89, ids % 83], axis=1).astype(np.uint16)
    assert pointer_entropies(pointers, 100)[2:] == pytest.approx([math.log(5000)] * 3)


def test_above_the_maximum_joint_histograms_are_sampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    pointers = np.random.default_rng(0).integers(0, 30, (1000, 3)).astype(np.uint8)
    monkeypatch.setattr(entropy, "MAX_JOINT_IDS", 300)
    sample = pointers[[i * 1000 // 300 for i in range(300)]]
    found = pointer_entropies(pointers, 30)
    assert found[0] == pytest.approx(plain_entropies(pointers)[0])
    assert found[1:] == pytest.approx(plain_entropies(sample)[1:])
    assert random_entropies(1000, 30, 3)[1:] == random_entropies(300, 30, 3)[1:]


@pytest.mark.parametrize(
    ("num_ids", "num_rows", "num_columns"),
    [(1000, 16, 3), (20_000, 100, 4), (100_000, 100, 2), (500, 500, 3), (50_000, 20, 4), (100_000, 3, 2)],
)
def test_random_pointers_have_the_expected_entropies(num_ids: int, num_rows: int, num_columns: int) -> None:
    rng = np.random.default_rng(1)
    pointers = rng.integers(0, num_rows, (num_ids, num_columns)).astype(np.uint16)
    assert pointer_entropies(pointers, num_rows) == pytest.approx(
        random_entropies(num_ids, num_rows, num_columns), abs=2 / num_ids**0.5
    )


def test_expectation_approaches_its_limits() -> None:
    assert random_entropies(10**9, 10, 3)[0] == pytest.approx(math.log(10), abs=1e-6)
    assert random_entropies(10**6, 10**5, 4)[3] == pytest.approx(math.log(10**6), abs=1e-6)
    assert random_entropies(10**5, 2**32, 32)[31] == pytest.approx(math.log(10**5), abs=1e-6)
    assert random_entropies(1, 7, 2) == pytest.approx((0, 0))
    assert random_entropies(100, 1, 2) == pytest.approx((0, 0))


def test_a_learned_column_lies_below_random() -> None:
    rng = np.random.default_rng(0)
    skewed = (rng.random((20_000, 4)) ** 3 * 64).astype(np.uint8)
    for found, random in zip(pointer_entropies(skewed, 64), random_entropies(20_000, 64, 4), strict=True):
        assert found < random


@pytest.mark.parametrize(
    ("pointers", "message"),
    [
        (np.zeros((3, 2), np.int64), "pointers are int64"),
        (np.zeros(3, np.uint8), "not unsigned"),
        (np.zeros((0, 2), np.uint8), "n, c ≥ 1"),
        (np.full((3, 2), 7, np.uint8), "pointer 7 is not below num_rows=7"),
    ],
)
def test_refuses_what_are_no_pointers(pointers: npt.NDArray[np.unsignedinteger], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pointer_entropies(pointers, 7)
