"""A clustering in parts: shares of work, pointers that are given, the errors of the sample."""

import dataclasses
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.cce_tables import Table, members_mean
from torchrec_cce.clustering.column import PAIR, sum_errors
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.clustering.table import TableClustering

pytest.importorskip("faiss")


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, 300),
    k=st.integers(1, 15),
    cuts=st.lists(st.integers(0, 300), max_size=4),
    residual=st.booleans(),
    weighted=st.booleans(),
)
def test_workers_may_share_columns_and_ranges_as_they_like(
    seed: int, n: int, k: int, cuts: list[int], residual: bool, weighted: bool
) -> None:
    """Each range and each column done by a worker of its own gives the bits of one worker."""
    table = Table.random(n=n, k=k, seed=seed)
    frequencies = np.random.default_rng(seed).integers(1, 9, n) if weighted else None
    config = ReclusterConfig(
        helper_init="residual" if residual else "zero", points_per_centroid=4, num_iterations=3, num_threads=2
    )

    def worker() -> TableClustering:
        return table.clustering(seed=seed, frequencies=frequencies, dtype=np.uint8, **dataclasses.asdict(config))

    trained = [worker().train([column])[0] for column in range(3)]
    centroids = [column.centroids for column in trained]
    pairs = None
    if worker().num_pairs:
        pairs = np.empty(worker().num_pairs, PAIR)
        for start, stop in pairwise(sorted({0, len(pairs), *(7 * cut % len(pairs) for cut in cuts)})):
            worker().nearest_pairs(centroids, start, stop, pairs[start:stop])
    bounds = sorted({0, n, *(cut for cut in cuts if cut < n)})
    pointers = np.empty((n, 3), np.uint8)
    shares = [worker().assign(centroids, start, stop, pointers[start:stop], pairs) for start, stop in pairwise(bounds)]
    done = worker().finish(centroids, np.sum(shares, axis=0))
    expected = table.recluster(dtype=np.uint8, seed=seed, frequencies=frequencies, **dataclasses.asdict(config))
    np.testing.assert_array_equal(pointers, expected.pointers)
    np.testing.assert_array_equal(done.weights, expected.weights)
    for name, state in done.row_states.items():
        np.testing.assert_array_equal(state, expected.row_states[name])
    assert (done.objective, done.share_changed) == (expected.objective, expected.share_changed)
    assert sum_errors(trained) == expected.sample_errors


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, 300),
    k=st.integers(1, 15),
    cuts=st.lists(st.integers(0, 300), max_size=4),
    residual=st.booleans(),
    weighted=st.booleans(),
)
def test_pointers_that_are_given_make_tables_of_their_members(
    seed: int, n: int, k: int, cuts: list[int], residual: bool, weighted: bool
) -> None:
    table = Table.random(n=n, k=k, seed=seed)
    rng = np.random.default_rng(seed)
    frequencies = rng.integers(1, 9, n) if weighted else None
    given_pointers, otherwise = rng.integers(0, k, (3, n)), rng.standard_normal((3, k, 4)).astype(np.float32)
    options = {
        "frequencies": frequencies,
        "helper_init": "residual" if residual else "zero",
        "chunk_size": 1 + seed % 99,
    }
    bounds = list(pairwise(sorted({0, n, *(cut for cut in cuts if cut < n)})))

    def worker() -> TableClustering:
        return table.clustering(dtype=np.uint8, **options)

    def given_of(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return given_pointers[:, ids]

    members = np.sum([worker().sum_members(given_of, *part) for part in bounds], axis=0)
    centroids = worker().member_means(members, otherwise)
    done = worker().finish(centroids, np.sum([worker().adopt(centroids, given_of, *part) for part in bounds], axis=0))
    costs = np.zeros(n)
    for column, pointers in enumerate(given_pointers):
        old = table.embeddings(column).astype(np.float64)
        has_members = np.isin(np.arange(k), pointers)
        expected = np.where(has_members[:, None], members_mean(old, pointers, k), otherwise[column])
        np.testing.assert_allclose(done.weights[column, 0], expected, rtol=1e-6, atol=1e-6)
        costs += np.square(old - expected[pointers]).sum(axis=1)
        h, h_helper = table.codes[column]
        for name, state in table.row_states.items():
            pair_means = (state[column, 0, h].astype(np.float64) + state[column, 1, h_helper]) / 2
            new = done.row_states[name][column, 0]
            np.testing.assert_allclose(new, members_mean(pair_means, pointers, k), rtol=1e-6, atol=1e-12)
        helper = members_mean(old - expected[pointers], table.helper_codes[column], k) if residual else 0
        np.testing.assert_allclose(done.weights[column, 1], np.broadcast_to(helper, (k, 4)), atol=1e-5)
    assert done.objective == pytest.approx(np.average(costs, weights=frequencies), rel=1e-5, abs=1e-9)
    assert done.share_changed == (given_pointers != table.codes[:, 0]).mean()


def test_adopting_what_was_clustered_is_the_clustering() -> None:
    table = Table.random(n=3000, k=30)
    done = table.recluster()
    clustering = table.clustering()

    def pointers(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return done.pointers[ids].T.astype(np.int64)

    centroids = clustering.member_means(clustering.sum_members(pointers, 0, 3000), done.weights[:, 0])
    adopted = clustering.finish(centroids, clustering.adopt(centroids, pointers, 0, 3000))
    # Lloyd's last step assigns; the means of what it assigned are a half step further.
    assert adopted.objective <= done.objective * (1 + 1e-6)
    np.testing.assert_array_equal(adopted.row_states["momentum"], done.row_states["momentum"])
    np.testing.assert_allclose(adopted.weights, done.weights, atol=0.1)


@pytest.mark.parametrize("weighted", [False, True])
def test_errors_of_the_sample(weighted: bool) -> None:
    table = Table.random(n=2000, k=20)
    frequencies = np.random.default_rng(0).integers(1, 9, 2000) if weighted else None
    errors = table.recluster(frequencies=frequencies).sample_errors  # all IDs are in the sample
    weights = np.ones(2000) if frequencies is None else frequencies
    parent = total = 0.0
    for column in range(3):
        old = table.embeddings(column).astype(np.float64)
        total += np.average(np.square(old - np.average(old, axis=0, weights=weights)).sum(axis=1), weights=weights)
        for row in range(20):
            members = table.codes[column, 0] == row
            gaps = old[members] - np.average(old[members], axis=0, weights=weights[members])
            parent += np.square(gaps).sum(axis=1) @ weights[members] / weights.sum()
    assert errors.parent == pytest.approx(parent)
    assert errors.total == pytest.approx(total)
    assert errors.new == pytest.approx(table.recluster(frequencies=frequencies).objective, rel=1e-5)
    assert errors.new < errors.total
