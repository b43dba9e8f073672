import threading

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_cce.clustering import assign
from torchrec_cce.clustering.assign import NearestCentroid
from torchrec_cce.clustering.loops import GROUP, add_rows, add_rows_plain, nearest_plain
from torchrec_cce.errors import ClusteringError, ConfigError

WIDTHS = [1, 2, 3, 4, 7, 8, 12, 16, 17, 24, 40, 600]


def gaussian(rng: np.random.Generator, *shape: int, offset: float = 0) -> npt.NDArray[np.float32]:
    return (rng.standard_normal(shape) + offset).astype(np.float32)


def assert_nearest(
    points: npt.NDArray[np.float32], centroids: npt.NDArray[np.float32], nearest: NearestCentroid
) -> None:
    """Every code is nearest up to a relative tie of 1e-6, and every distance is that of its code."""
    codes, distances = nearest(points)
    assert codes.dtype == np.int64
    assert distances.dtype == np.float32
    _, best = nearest_plain(points, centroids)
    chosen = np.square(points.astype(np.float64) - centroids[codes]).sum(axis=1)
    assert (chosen <= best * (1 + 1e-6)).all()
    tolerance = (points.shape[1] + 2) * 2.0**-24
    np.testing.assert_allclose(distances, chosen, rtol=tolerance)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("num_rows", [1, 2, GROUP, 63, 500])
def test_matches_float64_brute_force(width: int, num_rows: int) -> None:
    rng = np.random.default_rng(width * 1000 + num_rows)
    centroids, points = gaussian(rng, num_rows, width), gaussian(rng, 700, width)
    assert_nearest(points, centroids, NearestCentroid(centroids))


@pytest.mark.parametrize("offset", [100, 1e4])
@pytest.mark.parametrize("width", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("tree", [False, True])
def test_far_from_the_origin(offset: float, width: int, tree: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if tree:
        monkeypatch.setattr(assign, "_TREE_MAX_WIDTH", 100)
        monkeypatch.setattr(assign, "_TREE_MIN_ROWS", 1)
    rng = np.random.default_rng(0)
    centroids, points = gaussian(rng, 300, width, offset=offset), gaussian(rng, 2000, width, offset=offset)
    assert_nearest(points, centroids, NearestCentroid(centroids))


def test_the_tree_answers_like_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    centroids = gaussian(rng, assign._TREE_MIN_ROWS, 2)
    points = gaussian(rng, 3000, 2)
    by_tree = NearestCentroid(centroids)
    assert by_tree._tree is not None
    monkeypatch.setattr(assign, "_TREE_MAX_WIDTH", 0)
    by_loop = NearestCentroid(centroids)
    assert by_loop._tree is None
    codes, distances = by_loop(points)
    tree_codes, tree_distances = by_tree(points)
    np.testing.assert_allclose(tree_distances, distances, rtol=1e-6)
    assert (codes == tree_codes).mean() > 0.999


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32), width=st.sampled_from([1, 2, 4, 8, 16, 20]), rows=st.integers(1, 40), tree=st.booleans()
)
def test_a_point_is_answered_alike_in_every_batch(seed: int, width: int, rows: int, tree: bool) -> None:
    rng = np.random.default_rng(seed)
    # Few distinct values, so that there are ties and duplicates.
    centroids = rng.integers(-3, 4, (rows, width)).astype(np.float32)
    points = rng.integers(-6, 7, (int(rng.integers(1, 1200)), width)).astype(np.float32) / 2
    with pytest.MonkeyPatch.context() as patch:
        if tree:
            patch.setattr(assign, "_TREE_MAX_WIDTH", 100)
            patch.setattr(assign, "_TREE_MIN_ROWS", 1)
        nearest = NearestCentroid(centroids)
    codes, distances = nearest(points)
    if not tree:
        np.testing.assert_array_equal(codes, nearest_plain(points, centroids)[0])  # the first of a tie, exactly
    order = rng.permutation(len(points))
    cuts = np.sort(rng.integers(0, len(points) + 1, 4))
    parts = [nearest(points[part]) for part in np.split(order, cuts)]
    np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), codes[order])
    np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), distances[order])


def test_many_threads_share_one_object() -> None:
    rng = np.random.default_rng(0)
    nearest = NearestCentroid(gaussian(rng, 200, 5))
    points = gaussian(rng, 20_000, 5)
    expected = nearest(points)
    found: list[object] = [None] * 4

    def ask(slot: int) -> None:
        found[slot] = nearest(points)

    threads = [threading.Thread(target=ask, args=(slot,)) for slot in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for answer in found:
        np.testing.assert_array_equal(answer, expected)


def test_no_points_and_strided_points() -> None:
    rng = np.random.default_rng(0)
    nearest = NearestCentroid(gaussian(rng, 9, 4))
    codes, distances = nearest(np.empty((0, 4), np.float32))
    assert codes.shape == distances.shape == (0,)
    points = gaussian(rng, 4, 50).T
    np.testing.assert_array_equal(nearest(points)[0], nearest(points.copy())[0])


def test_identical_centroids_give_the_first() -> None:
    codes, distances = NearestCentroid(np.ones((13, 3), np.float32))(np.ones((5, 3), np.float32))
    assert not codes.any()
    assert not distances.any()


@pytest.mark.parametrize("width", [2, 20])
@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_is_an_error_that_says_how_many(
    width: int, tree: bool, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tree:
        monkeypatch.setattr(assign, "_TREE_MAX_WIDTH", 100)
        monkeypatch.setattr(assign, "_TREE_MIN_ROWS", 1)
    centroids = np.zeros((10, width), np.float32)
    points = np.zeros((1000, width), np.float32)
    points[[3, 700], 1] = value
    with pytest.raises(ClusteringError, match="2 of 1000 points"):
        NearestCentroid(centroids)(points)
    centroids[4, 0] = value
    with pytest.raises(ClusteringError, match="1 of 10 centroids"):
        NearestCentroid(centroids)


def test_squares_beyond_float32_are_an_error() -> None:
    points = np.array([[0, 0], [1e25, 0]], np.float32)
    with pytest.raises(ClusteringError, match="1 of 2 points"):
        NearestCentroid(np.zeros((3, 2), np.float32))(points)


@pytest.mark.parametrize("centroids", [np.zeros((0, 2), np.float32), np.zeros(3, np.float32), np.zeros((3, 2))])
def test_refuses_what_is_no_table_of_centroids(centroids: npt.NDArray[np.float32]) -> None:
    with pytest.raises(ConfigError, match="centroids are float"):
        NearestCentroid(centroids)


@pytest.mark.parametrize("points", [np.zeros((5, 3), np.float32), np.zeros((5, 2)), np.zeros(2, np.float32)])
def test_refuses_points_of_another_kind(points: npt.NDArray[np.float32]) -> None:
    with pytest.raises(ConfigError, match=r"not float32 \[N, 2\]"):
        NearestCentroid(np.zeros((3, 2), np.float32))(points)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 9), width=st.integers(0, 5), count=st.integers(0, 200))
def test_add_rows_matches_its_plain_form(seed: int, rows: int, width: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    table = rng.integers(-(2**40), 2**40, (rows, width))
    totals = rng.integers(-(2**40), 2**40, (3, width))
    expected = totals.copy()
    targets, codes = rng.integers(0, 3, count), rng.integers(0, rows, count)
    add_rows(totals, targets, table, codes)
    add_rows_plain(expected, targets, table, codes)
    np.testing.assert_array_equal(totals, expected)
