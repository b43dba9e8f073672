"""The nearest centroid by brute force and by cells: exact, and with the same bits in any batch and thread."""

import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.kernel_references import reference_nearest
from torchrec_cce.clustering.kmeans import nearest as assign
from torchrec_cce.clustering.kmeans.brute_force import GROUP, nearest_loop, pack_centroids
from torchrec_cce.clustering.kmeans.cells import Cells
from torchrec_cce.clustering.kmeans.nearest import NearestCentroid
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
    _, best = reference_nearest(points, centroids)
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
def test_far_from_the_origin(offset: float, width: int) -> None:
    rng = np.random.default_rng(0)
    centroids, points = gaussian(rng, 300, width, offset=offset), gaussian(rng, 2000, width, offset=offset)
    assert_nearest(points, centroids, NearestCentroid(centroids))


def by_loop(
    points: npt.NDArray[np.float32], centroids: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    codes, distances = np.empty(len(points), np.int64), np.empty(len(points), np.float32)
    nearest_loop(points.shape[1])(points, pack_centroids(centroids), codes, distances)
    return codes, distances


def by_cells(
    points: npt.NDArray[np.float32], centroids: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    codes, distances = np.empty(len(points), np.int64), np.empty(len(points), np.float32)
    Cells(centroids)(points, codes, distances)
    return codes, distances


Made = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


def spread_out(rng: np.random.Generator, rows: int, count: int, width: int) -> Made:
    return gaussian(rng, rows, width), gaussian(rng, count, width)


def clustered(rng: np.random.Generator, rows: int, count: int, width: int) -> Made:
    middles = gaussian(rng, 5, width)
    near = middles[rng.integers(0, 5, rows)] + 1e-3 * gaussian(rng, rows, width)
    return near, middles[rng.integers(0, 5, count)] + 1e-3 * gaussian(rng, count, width)


def on_a_lattice(rng: np.random.Generator, rows: int, count: int, width: int) -> Made:
    """Duplicates, and points in the middle between many centroids."""
    points = rng.integers(-6, 7, (count, width)).astype(np.float32) / 2
    return rng.integers(-3, 4, (rows, width)).astype(np.float32), points


def far_away(rng: np.random.Generator, rows: int, count: int, width: int) -> Made:
    """So far that float32 leaves few digits of a difference: many ties by rounding."""
    return gaussian(rng, rows, width, offset=1e5), gaussian(rng, count, width, offset=1e5)


def far_from_each_other(rng: np.random.Generator, rows: int, count: int, width: int) -> Made:
    return gaussian(rng, rows, width), gaussian(rng, count, width, offset=1e6)


def of_all_sizes(rng: np.random.Generator, rows: int, count: int, width: int) -> Made:
    """From squares that are denormal, or zero, to those that nearly overflow."""
    sizes = [np.exp2(rng.uniform(-80, 60, (number, 1))).astype(np.float32) for number in (rows, count)]
    return gaussian(rng, rows, width) * sizes[0], gaussian(rng, count, width) * sizes[1]


def in_one_line(rng: np.random.Generator, rows: int, count: int, width: int) -> Made:
    """Only the last dimension differs."""
    centroids, points = np.zeros((rows, width), np.float32), np.zeros((count, width), np.float32)
    centroids[:, -1], points[:, -1] = gaussian(rng, rows), gaussian(rng, count)
    return centroids, points


def centroids_themselves(rng: np.random.Generator, rows: int, count: int, width: int) -> Made:
    centroids = gaussian(rng, rows, width)
    return centroids, centroids[rng.integers(0, rows, count)]


KINDS = [
    spread_out,
    clustered,
    on_a_lattice,
    far_away,
    far_from_each_other,
    of_all_sizes,
    in_one_line,
    centroids_themselves,
]


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(KINDS),
    width=st.sampled_from([1, 2, 4, 8, 10]),
    rows=st.one_of(st.integers(1, 200), st.sampled_from([1023, 1024, 1025, 3000, 16_384, 17_000])),
    count=st.integers(0, 300),
)
def test_cells_answer_as_the_loop_does_bit_for_bit(
    seed: int, kind: Callable[..., Made], width: int, rows: int, count: int
) -> None:
    centroids, points = kind(np.random.default_rng(seed), rows, count, width)
    codes, distances = by_loop(points, centroids)
    found, lengths = by_cells(points, centroids)
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_array_equal(lengths.view(np.int32), distances.view(np.int32))


@pytest.mark.parametrize("width", sorted(assign._CELLS_FROM))
def test_cells_take_over_where_they_are_faster(width: int) -> None:
    rng = np.random.default_rng(width)
    centroids, points = spread_out(rng, assign._CELLS_FROM[width], 500, width)
    nearest = NearestCentroid(centroids)
    assert isinstance(nearest._cells, Cells)
    assert NearestCentroid(centroids[:-1])._cells is None
    for found, expected in zip(nearest(points), by_loop(points, centroids), strict=True):
        np.testing.assert_array_equal(found, expected)


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
    points[[3, 700], 1] = value
    with pytest.raises(ClusteringError, match="2 of 1000 points"):
        NearestCentroid(centroids)(points)
    centroids[4, 0] = value
    with pytest.raises(ClusteringError, match=f"1 of {rows} centroids"):
        NearestCentroid(centroids)


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
