"""Tables with few IDs, equal or huge values, and states and pointers of every kind."""

import dataclasses

import numpy as np
import pytest

from tests.support.cce_tables import Table, assert_same, members_mean
from tests.support.kernel_references import reference_nearest

pytest.importorskip("faiss")


def test_fewer_ids_than_centroids() -> None:
    table = Table.random(n=4, k=10)
    done = table.recluster(frequencies=np.array([1, 1, 0, 1]))
    assert done.pointers.max() <= 2
    for column in range(3):
        expected = np.unique(table.embeddings(column)[[0, 1, 3]], axis=0)
        np.testing.assert_array_equal(done.weights[column, 0, : len(expected)], expected)
        assert not done.weights[column, 0, len(expected) :].any()


@pytest.mark.parametrize("n", [3, 1000])
def test_identical_embeddings_share_one_centroid(n: int) -> None:
    table = Table.random(n=n)
    table.weights[...] = 0.25
    done = table.recluster(helper_init="residual")
    assert not done.pointers.any()
    np.testing.assert_array_equal(done.weights[:, 0, 0], 0.5)
    assert not done.weights[:, 0, 1:].any()
    assert not done.weights[:, 1].any()
    assert done.objective == 0
    assert done.entropies == (0, 0, 0)


def test_all_zero_weights() -> None:
    table = Table.random(n=50)
    table.weights[...] = 0
    done = table.recluster(helper_init="residual")
    assert not done.weights.any()
    assert not done.pointers.any()


@pytest.mark.parametrize("n", [1, 30])
def test_one_row(n: int) -> None:
    table = Table.random(n=n, k=1)
    done = table.recluster(dtype=np.uint8)
    assert not done.pointers.any()
    np.testing.assert_allclose(done.weights[:, 0], table.weights[:, 0] + table.weights[:, 1])
    assert done.share_changed == 0


def test_far_from_the_origin() -> None:
    near = Table.random(n=3000, k=30)
    far = dataclasses.replace(near, weights=near.weights + np.float32(1000))
    done, reference = far.recluster(helper_init="residual"), near.recluster(helper_init="residual")
    assert done.objective == pytest.approx(reference.objective, rel=0.05)
    for column in range(3):
        old, (codebook, helper) = far.embeddings(column), done.weights[column]
        chosen = done.pointers[:, column]
        assert (
            np.square(old.astype(np.float64) - codebook[chosen]).sum(axis=1)
            <= reference_nearest(old, codebook)[1] * (1 + 1e-6)
        ).all()
        residuals = old.astype(np.float64) - codebook[chosen]
        np.testing.assert_allclose(helper, members_mean(residuals, far.helper_codes[column], 30), atol=2e-4)


def test_small_states_do_not_vanish_beside_large_ones() -> None:
    table = Table.random(n=2000)
    table.row_states["sum"][:] = np.where(table.row_states["sum"] > 0.5, 1e12, 1e-9)
    done = table.recluster()
    for column in range(3):
        state = table.row_states["sum"][column].astype(np.float64)
        h, h_helper = table.codes[column]
        expected = members_mean((state[0, h] + state[1, h_helper]) / 2, done.pointers[:, column], 10)
        np.testing.assert_allclose(done.row_states["sum"][column, 0], expected, rtol=1e-5)


def test_states_of_one_value_a_row_or_of_many_dimensions() -> None:
    table = Table.random(n=100)
    table.row_states = {"blocks": np.random.default_rng(0).random((3, 2, 10, 2, 5)).astype(np.float32)}
    assert table.recluster().row_states["blocks"].shape == (3, 2, 10, 2, 5)


def test_every_pointer_dtype() -> None:
    table = Table.random(n=300)
    expected = table.recluster(dtype=np.uint8)
    for dtype in (np.uint16, np.uint32, "uint16"):
        done = table.recluster(dtype=dtype)
        assert done.pointers.dtype == np.dtype(dtype)
        assert_same(done, expected)
