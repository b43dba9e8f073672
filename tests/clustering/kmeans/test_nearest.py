"""The nearest centroid by scores and by cells: exact, and with the same bits in any batch and thread."""

import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.kernel_references import reference_distances, reference_fma, reference_nearest
from tests.support.near_ties import (
    KINDS,
    Answers,
    Made,
    assert_same_bits,
    by_definition,
    gaussian,
    on_a_lattice,
    spread_out,
)
from torchrec_cce.clustering.kmeans import nearest as assign
from torchrec_cce.clustering.kmeans.cells import Cells
from torchrec_cce.clustering.kmeans.nearest import NearestCentroid
from torchrec_cce.clustering.kmeans.scores import Scores, highest_score
from torchrec_cce.clustering.kmeans.simd import LANES
from torchrec_cce.errors import ClusteringError, ConfigError

WIDTHS = [1, 2, 3, 4, 7, 8, 12, 16, 17, 24, 40, 600]


def assert_nearest(
    points: npt.NDArray[np.float32], centroids: npt.NDArray[np.float32], nearest: NearestCentroid
) -> None:
    """Every code is nearest up to a relative tie of 1e-6, and every distance is that of its code."""
    codes, distances = nearest(points)
    assert codes.dtype == np.int64
    assert distances.dtype == np.float32
    _, best = reference_nearest(points, centroids)
    chosen = np.square(points.astype(np.float64) - centroids[codes]).sum(axis=1)
    assert (chosen <= best * (1 + 1e-6)).all()
    tolerance = (points.shape[1] + 2) * 2.0**-24
    np.testing.assert_allclose(distances, chosen, rtol=tolerance)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("num_rows", [1, 2, LANES, 63, 500])
def test_matches_float64_brute_force(width: int, num_rows: int) -> None:
    rng = np.random.default_rng(width * 1000 + num_rows)
    centroids, points = gaussian(rng, num_rows, width), gaussian(rng, 700, width)
    assert_nearest(points, centroids, NearestCentroid(centroids))


@pytest.mark.parametrize("offset", [100, 1e4])
@pytest.mark.parametrize("width", [2, 4, 8, 16, 32])
def test_far_from_the_origin(offset: float, width: int) -> None:
    rng = np.random.default_rng(0)
    centroids, points = gaussian(rng, 300, width, offset=offset), gaussian(rng, 2000, width, offset=offset)
    assert_nearest(points, centroids, NearestCentroid(centroids))


def by(search: Scores | Cells, points: npt.NDArray[np.float32]) -> Answers:
    codes, distances = np.empty(len(points), np.int64), np.empty(len(points), np.float32)
    search(points, codes, distances)
    return codes, distances


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(KINDS),
    width=st.sampled_from([1, 2, 4, 8, 16, 20]),
    rows=st.integers(1, 200),
    count=st.integers(0, 50),
)
def test_scores_answer_as_defined_bit_for_bit(
    seed: int, kind: Callable[..., Made], width: int, rows: int, count: int
) -> None:
    centroids, points = kind(np.random.default_rng(seed), rows, count, width)
    assert_same_bits(by(Scores(centroids), points), by_definition(points, centroids))


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(KINDS),
    width=st.sampled_from([1, 2, 4, 8, 16, 64]),
    rows=st.integers(1, 100),
)
def test_no_score_is_above_what_its_distance_allows(
    seed: int, kind: Callable[..., Made], width: int, rows: int
) -> None:
    """The proof of `highest_score`, checked for every centroid and point, not only for those that are near."""
    centroids, points = kind(np.random.default_rng(seed), rows, 30, width)
    centre = centroids.mean(axis=0, dtype=np.float64).astype(np.float32)
    ys, xs = centroids - centre, points - centre
    lengths = [np.square(vectors.astype(np.float64)).sum(axis=1) for vectors in (xs, ys)]
    xs, points, lengths[0] = (array[lengths[0] < 2.0**100] for array in (xs, points, lengths[0]))
    ys, centroids, lengths[1] = (array[lengths[1] < 2.0**100] for array in (ys, centroids, lengths[1]))
    scores = np.repeat((lengths[1] / 2).astype(np.float32)[None], len(xs), axis=0)
    for x, y in zip(xs.T, ys.T, strict=True):
        scores = reference_fma(x[:, None] + 0 * y, -y + 0 * x[:, None], scores)
    distances = reference_distances(points, centroids).astype(np.float64)
    allowed = [
        [np.float32(highest_score(distance, length, width)) for distance in row]
        for row, length in zip(distances, lengths[0], strict=True)
    ]
    assert (scores <= np.reshape(np.array(allowed, np.float32), scores.shape)).all()


def test_scores_decide_nearly_always() -> None:
    """Else the other tests would say nothing about the way that is taken nearly always; and ties are not decided."""
    rng = np.random.default_rng(0)
    codes, distances = np.empty(5000, np.int64), np.empty(5000, np.float32)
    for offset in (0, 1e4):
        centroids, points = gaussian(rng, 500, 8, offset=offset), gaussian(rng, 5000, 8, offset=offset)
        assert Scores(centroids)(points, codes, distances) < 50
    assert Scores(np.concatenate([centroids, centroids]))(points, codes, distances) == 5000
    assert codes.max() < 500


def test_one_centroid_beyond_scores_and_points_that_are() -> None:
    rng = np.random.default_rng(0)
    centroids, points = gaussian(rng, 100, 4), gaussian(rng, 200, 4)
    points[::3] *= 2.0**51
    centroids[70] *= 2.0**55
    assert_same_bits(by(Scores(centroids), points), by_definition(points, centroids))
    centroids[70] = 3e38  # squares of it are infinite
    with np.errstate(over="ignore", invalid="ignore"):
        assert_same_bits(by(Scores(centroids), points), by_definition(points, centroids))


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(KINDS),
    width=st.sampled_from([1, 2, 4, 8, 10]),
    rows=st.one_of(st.integers(1, 200), st.sampled_from([1023, 1024, 1025, 3000, 16_384, 17_000])),
    count=st.integers(0, 300),
)
def test_cells_answer_as_scores_do_bit_for_bit(
    seed: int, kind: Callable[..., Made], width: int, rows: int, count: int
) -> None:
    centroids, points = kind(np.random.default_rng(seed), rows, count, width)
    assert_same_bits(by(Cells(centroids), points), by(Scores(centroids), points))


@pytest.mark.parametrize("width", sorted(assign._CELLS_FROM))
def test_cells_take_over_where_they_are_faster(width: int) -> None:
    rng = np.random.default_rng(width)
    centroids, points = spread_out(rng, assign._CELLS_FROM[width], 500, width)
    nearest = NearestCentroid(centroids)
    assert isinstance(nearest._search, Cells)
    assert isinstance(NearestCentroid(centroids[:-1])._search, Scores)
    assert_same_bits(nearest(points), by(Scores(centroids), points))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    width=st.sampled_from([1, 2, 4, 8, 16, 20]),
    rows=st.integers(1, 40),
    many=st.booleans(),
)
def test_a_point_is_answered_alike_in_every_batch(seed: int, width: int, rows: int, many: bool) -> None:
    rng = np.random.default_rng(seed)
    centroids, points = on_a_lattice(rng, rows, int(rng.integers(1, 1200)), width)
    if many and width in assign._CELLS_FROM:
        centroids = np.resize(centroids, (assign._CELLS_FROM[width], width))
    nearest = NearestCentroid(centroids)
    codes, distances = nearest(points)
    np.testing.assert_array_equal(codes, reference_nearest(points, centroids[:rows])[0])  # the first of a tie, exactly
    order = rng.permutation(len(points))
    cuts = np.sort(rng.integers(0, len(points) + 1, 4))
    parts = [nearest(points[part]) for part in np.split(order, cuts)]
    np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), codes[order])
    np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), distances[order])


@pytest.mark.parametrize("rows", [200, 5000])
def test_many_threads_share_one_object(rows: int) -> None:
    rng = np.random.default_rng(0)
    nearest = NearestCentroid(gaussian(rng, rows, 5))
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


@pytest.mark.parametrize(("rows", "width"), [(10, 2), (10, 20), (5000, 4)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_is_an_error_that_says_how_many(rows: int, width: int, value: float) -> None:
    centroids = np.zeros((rows, width), np.float32)
    points = np.zeros((1000, width), np.float32)
    points[[3, 999], 1] = value  # the last one of a batch also fills up its tile
    with pytest.raises(ClusteringError, match="2 of 1000 points"):
        NearestCentroid(centroids)(points)
    centroids[4, 0] = value
    with pytest.raises(ClusteringError, match=f"1 of {rows} centroids"):
        NearestCentroid(centroids)


def test_nothing_beyond_the_batch_is_written() -> None:
    """The last tile is filled up with copies of the last point, here of one whose scores are infinite."""
    points = gaussian(np.random.default_rng(0), 40, 3)
    points[:17] = 3e38
    codes, distances = np.full(40, -7), np.full(40, -7, np.float32)
    Scores(points[20:])(points[:17], codes[:17], distances[:17])
    assert (codes[17:] == -7).all()
    assert (distances[17:] == -7).all()


@pytest.mark.parametrize("rows", [3, 5000])
def test_squares_beyond_float32_are_an_error(rows: int) -> None:
    points = np.array([[0, 0], [1e25, 0]], np.float32)
    with pytest.raises(ClusteringError, match="1 of 2 points"):
        NearestCentroid(np.zeros((rows, 2), np.float32))(points)


@pytest.mark.parametrize("centroids", [np.zeros((0, 2), np.float32), np.zeros(3, np.float32), np.zeros((3, 2))])
def test_refuses_what_is_no_table_of_centroids(centroids: npt.NDArray[np.float32]) -> None:
    with pytest.raises(ConfigError, match="centroids are float"):
        NearestCentroid(centroids)


@pytest.mark.parametrize("points", [np.zeros((5, 3), np.float32), np.zeros((5, 2)), np.zeros(2, np.float32)])
def test_refuses_points_of_another_kind(points: npt.NDArray[np.float32]) -> None:
    with pytest.raises(ConfigError, match=r"not float32 \[N, 2\]"):
        NearestCentroid(np.zeros((3, 2), np.float32))(points)
