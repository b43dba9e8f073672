"""Sums of fixed-point numbers are exact, have room for what they may reach, and add rows as numpy does."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_cce.clustering.fixed_point import FixedPoint, add_rows
from torchrec_cce.errors import ClusteringError


@settings(deadline=None, max_examples=50)
@given(values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=50), seed=st.integers(0, 2**32))
def test_fixed_point_sums_are_exact_to_31_bits_in_any_order(values: list[float], seed: int) -> None:
    terms = np.array(values, np.float32)
    largest = float(np.abs(terms).max())
    unit = FixedPoint(1e9 * largest)  # room for a billion of them
    encoded = unit.encode(terms)
    total = encoded.sum()
    assert np.random.default_rng(seed).permutation(encoded).sum() == total
    error = abs(float(unit.decode(total)) - float(terms.astype(np.float64).sum()))
    assert error <= len(terms) * (largest * 2.0**-32 + largest * 2.0**-50)


@pytest.mark.parametrize("largest", [0.0, 1e-44, 1.0, 3e38])
def test_fixed_point_does_not_overflow_at_its_bound(largest: float) -> None:
    count = 10**9
    unit = FixedPoint(count * largest)
    encoded = int(unit.encode(np.array(largest)))
    assert encoded * count + count // 2 < 2**63
    assert float(unit.decode(np.array(encoded * count))) == pytest.approx(largest * count, rel=1e-9)


def test_fixed_point_refuses_sums_that_are_not_finite() -> None:
    with pytest.raises(ClusteringError, match="may reach inf"):
        FixedPoint(float("inf"))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 9), width=st.integers(0, 5), count=st.integers(0, 200))
def test_rows_are_added_as_numpy_adds_them(seed: int, rows: int, width: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    table = rng.integers(-(2**40), 2**40, (rows, width))
    totals = rng.integers(-(2**40), 2**40, (3, width))
    expected = totals.copy()
    targets, codes = rng.integers(0, 3, count), rng.integers(0, rows, count)
    add_rows(totals, targets, table, codes)
    np.add.at(expected, targets, table[codes])
    np.testing.assert_array_equal(totals, expected)
