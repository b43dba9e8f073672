import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from torchrec_cce.clustering.column import match_labels


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 2**32), num_points=st.integers(1, 200), num_labels=st.integers(1, 20))
def test_keeps_at_least_half_of_what_the_best_matching_keeps(seed: int, num_points: int, num_labels: int) -> None:
    rng = np.random.default_rng(seed)
    old, new = rng.integers(0, num_labels + 3, num_points), rng.integers(0, num_labels, num_points)
    weights = rng.integers(1, 5, num_points).astype(np.float64)
    order = match_labels(old, new, weights, num_labels=num_labels)
    np.testing.assert_array_equal(np.sort(order), np.arange(num_labels))
    overlap = np.zeros((num_labels + 3, num_labels))
    np.add.at(overlap, (old, new), weights)
    numbers = np.empty(num_labels, np.int64)
    numbers[order] = np.arange(num_labels)
    kept = weights[numbers[new] == old].sum()
    rows, columns = linear_sum_assignment(-overlap[:num_labels])
    assert kept >= overlap[rows, columns].sum() / 2


@pytest.mark.parametrize("num_labels", [1, 7, 300])
def test_undoes_a_renumbering(num_labels: int) -> None:
    rng = np.random.default_rng(0)
    new = rng.permutation(np.repeat(np.arange(num_labels), 5))
    renumbering = rng.permutation(num_labels)
    order = match_labels(renumbering[new], new, np.ones(len(new)), num_labels=num_labels)
    np.testing.assert_array_equal(renumbering[order], np.arange(num_labels))
