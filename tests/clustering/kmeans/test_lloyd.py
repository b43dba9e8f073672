"""Lloyd's iterations against a plain form, and the assignment by neighbours against that by all centroids."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.kernel_references import reference_nearest
from torchrec_cce.clustering.kmeans import lloyd as module
from torchrec_cce.clustering.kmeans.lloyd import lloyd
from torchrec_cce.clustering.kmeans.nearest import NearestCentroid
from torchrec_cce.clustering.kmeans.neighbours import reassign_loop
from torchrec_cce.clustering.kmeans.tiles import pack_tiles

Floats = npt.NDArray[np.float32]


def plain_lloyd(points: Floats, first: Floats, weights: Floats, num_iterations: int) -> Floats:
    """Without empty clusters."""
    centroids = first
    for _ in range(num_iterations):
        codes = reference_nearest(points, centroids)[0]
        masses = np.bincount(codes, weights, len(first))
        sums = [np.bincount(codes, weights * column.astype(np.float64), len(first)) for column in points.T]
        assert masses.all()
        centroids = (np.stack(sums, axis=1) / masses[:, None]).astype(np.float32)
    return centroids


def made(rng: np.random.Generator, kind: str, count: int, width: int) -> Floats:
    """[count, width], at most 1 in absolute value."""
    points = rng.uniform(-1, 1, (count, width))
    if kind == "clustered":
        points = 0.5 * points[rng.integers(0, min(7, count), count)] + 0.001 * points
    if kind == "lattice":  # ties, duplicates
        points = np.rint(4 * points) / 4
    if kind == "tiny":  # squares are denormal or zero
        points = points * 2.0**-68
    if kind == "outliers":
        points *= 2.0 ** -rng.integers(0, 30, (count, 1))
    return points.astype(np.float32)


KINDS = ["uniform", "clustered", "lattice", "tiny", "outliers"]


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(KINDS),
    width=st.sampled_from([1, 2, 4, 8, 16, 17]),
    rows=st.integers(1, 300),
    count=st.integers(1, 3000),
    shift=st.sampled_from([0, 0.001, 0.3, 3]),
)
def test_points_are_assigned_again_as_exactly_as_at_first(
    seed: int, kind: str, width: int, rows: int, count: int, shift: float
) -> None:
    """From any old centroid, also a far one or one that is now a copy of another."""
    rng = np.random.default_rng(seed)
    points = made(rng, kind, count, width)
    centroids = points[rng.integers(0, count, rows)]
    before = NearestCentroid(centroids)(points)[0] if shift < 3 else rng.integers(0, rows, count)
    order = np.argsort(before, kind="stable")
    points, starts = points[order], np.searchsorted(before[order], np.arange(rows + 1))
    moved = centroids + np.float32(shift) * points[rng.integers(0, count, rows)]
    moved = np.clip(moved, -1, 1).astype(np.float32)
    codes = np.full(count, -1, np.int32)
    cut = int(rng.integers(0, rows + 1))
    for first, last in ((0, cut), (cut, rows)):
        reassign_loop(width)(points, starts, moved, pack_tiles(moved), first, last, codes)
    np.testing.assert_array_equal(codes, NearestCentroid(moved)(points)[0])


@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("count", [400, 4000])  # assigned by NearestCentroid, by neighbours
def test_is_plain_lloyd(width: int, count: int) -> None:
    rng = np.random.default_rng(width)
    points, weights = made(rng, "uniform", count, width), rng.uniform(0.5, 2, count).astype(np.float32)
    for num_iterations in (1, 2, 12):
        found = lloyd(points, points[:40], weights, num_iterations=num_iterations, num_threads=2)
        expected = plain_lloyd(points, points[:40], weights, num_iterations)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [2, 8, 16])
def test_how_points_are_assigned_changes_no_bit(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(width)
    points, weights = made(rng, "clustered", 4000, width), rng.uniform(0.5, 2, 4000).astype(np.float32)
    results = []
    for largest_share in (1, -1):  # always by neighbours, never
        monkeypatch.setattr(module, "_MAX_NEAR", largest_share)
        results.append(module.lloyd(points, points[:60], weights, num_iterations=9, num_threads=1))
    np.testing.assert_array_equal(results[0], results[1])


def test_converged_is_the_same_for_ever() -> None:
    rng = np.random.default_rng(0)
    points, weights = made(rng, "uniform", 2000, 2), np.ones(2000, np.float32)
    results = [
        lloyd(points, points[:20], weights, num_iterations=number, num_threads=1) for number in (300, 301, 10**9)
    ]
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[2], results[0])


@pytest.mark.parametrize("count", [500, 5000])
def test_empty_clusters_start_again_where_it_costs_most(count: int) -> None:
    """All but one start at the same place; three far groups of copies must all get a centroid."""
    rng = np.random.default_rng(0)
    points = made(rng, "uniform", count, 2) * np.float32(0.01)
    points[:100] = [[0.9, 0.9], [0.9, -0.9], [-0.9, 0.9], [-0.9, -0.9]] * 25
    first = np.repeat(points[200:201], 12, axis=0)
    weights = np.ones(count, np.float32)
    found = lloyd(points, first, weights, num_iterations=20, num_threads=2)
    assert len(np.unique(found, axis=0)) == 12
    assert NearestCentroid(found)(points)[1][:100].max() == 0
