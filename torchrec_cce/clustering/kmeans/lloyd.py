"""Lloyd's k-means from given centroids, with exact assignments; and the first distinct points, where k-means starts."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.kmeans.nearest import NearestCentroid
from torchrec_cce.clustering.kmeans.neighbours import reassign_loop
from torchrec_cce.clustering.kmeans.tiles import pack_tiles
from torchrec_cce.jit import jit

_MIN_MEMBERS = 32
"""The mean number of points in a cluster from which it pays to list the neighbours of every cluster."""
_MAX_NEAR = 0.2
"""The largest share of all centroids that may be neighbours of a point, in the mean over points."""
_ASKED = 32
"""The number of points from which that share is estimated."""
_LOOKED_AT = 16
"""The number of costly points considered for each empty cluster: some may be copies of each other."""

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int32]
Starts = npt.NDArray[np.int64]


def lloyd(points: Floats, first: Floats, weights: Floats, *, num_iterations: int, num_threads: int) -> Floats:
    """The centroids [k, d] float32 after `num_iterations`, or as soon as no point changes its cluster.

    The bits are the same for any number of threads: the sum of a cluster is taken by one thread, in float64, in an
    order that depends on the points alone. Empty clusters start again at the points that cost most.

    Args:
        points: [N, d] float32, at most 1 in absolute value.
        first: [k, d] float32, the centroids to start from, at most 1 in absolute value.
        weights: [N] float32, positive.
        num_iterations: at least 1.
        num_threads: at least 1.
    """
    centroids, starts = first, np.zeros(0, np.int64)
    codes = np.zeros(0, np.int32)
    with ThreadPoolExecutor(num_threads) as pool:
        for number in range(num_iterations):
            before, codes = codes, np.empty(len(points), np.int32)
            if number == 0 or not _neighbours_pay(points, before, centroids):
                _assign(pool, num_threads, points, centroids, codes)
            else:
                _reassign(pool, num_threads, points, starts, centroids, codes)
            if number > 0 and np.array_equal(before, codes):
                break
            # In the order of their clusters, most points stay where they are in the next iterations.
            points, weights, codes, starts = _group(points, weights, codes, len(first))
            centroids = _means(points, weights, starts)
            empty = np.flatnonzero(np.diff(starts) == 0)
            if len(empty):
                centroids[empty] = _spare_points(points, weights, codes, centroids, len(empty))
    return centroids


def _neighbours_pay(points: Floats, codes: Codes, centroids: Floats) -> bool:
    """Whether `_reassign` is faster than `_assign`; both find the same."""
    if len(points) < _MIN_MEMBERS * len(centroids):
        return False
    asked = np.linspace(0, len(points) - 1, _ASKED).astype(np.int64)
    near = 0
    for point, own in zip(points[asked], centroids[codes[asked]], strict=True):
        near += np.count_nonzero(np.square(centroids - own).sum(axis=1) <= 4 * np.square(point - own).sum())
    return near <= _MAX_NEAR * _ASKED * len(centroids)


def _assign(pool: ThreadPoolExecutor, num_threads: int, points: Floats, centroids: Floats, codes: Codes) -> None:
    nearest = NearestCentroid(centroids)
    cuts = np.linspace(0, len(points), num_threads + 1).astype(int)

    def work(begin: int, end: int) -> None:
        codes[begin:end] = nearest(points[begin:end])[0]

    list(pool.map(work, cuts[:-1], cuts[1:]))


def _reassign(
    pool: ThreadPoolExecutor, num_threads: int, points: Floats, starts: Starts, centroids: Floats, codes: Codes
) -> None:
    loop, packed = reassign_loop(centroids.shape[1]), pack_tiles(centroids)
    cuts = np.searchsorted(starts, np.linspace(0, len(points), num_threads + 1))
    cuts[0], cuts[-1] = 0, len(centroids)

    def work(begin: int, end: int) -> None:
        loop(points, starts, centroids, packed, begin, end, codes)

    list(pool.map(work, cuts[:-1], cuts[1:]))


@jit
def _group(points: Floats, weights: Floats, codes: Codes, num_rows: int) -> tuple[Floats, Floats, Codes, Starts]:
    """Points, weights and codes, stably sorted by code, and [k + 1] the places where each code starts."""
    starts = np.zeros(num_rows + 1, np.int64)
    for index in range(len(codes)):
        starts[codes[index] + 1] += 1
    for row in range(num_rows):
        starts[row + 1] += starts[row]
    places = starts.copy()
    points_out, weights_out, codes_out = np.empty_like(points), np.empty_like(weights), np.empty_like(codes)
    for index in range(len(codes)):
        code = codes[index]
        place = places[code]
        places[code] = place + 1
        for dim in range(points.shape[1]):
            points_out[place, dim] = points[index, dim]
        weights_out[place] = weights[index]
        codes_out[place] = code
    return points_out, weights_out, codes_out, starts


@jit
def _means(points: Floats, weights: Floats, starts: Starts) -> Floats:
    """[k, d]: the mean of each cluster, zero where it is empty."""
    num_rows, width = len(starts) - 1, points.shape[1]
    means = np.zeros((num_rows, width), np.float32)
    sums = np.empty(width)
    for row in range(num_rows):
        mass = 0.0
        sums[:] = 0.0
        for index in range(starts[row], starts[row + 1]):
            weight = np.float64(weights[index])
            mass += weight
            for dim in range(width):
                sums[dim] += weight * points[index, dim]
        if mass > 0.0:
            for dim in range(width):
                means[row, dim] = sums[dim] / mass
    return means


def _spare_points(points: Floats, weights: Floats, codes: Codes, centroids: Floats, count: int) -> Floats:
    """[count, d]: the distinct points that cost most, repeated if too few of the points considered are distinct."""
    costs = weights * np.square(points - centroids[codes]).sum(axis=1)
    size = min(len(points), _LOOKED_AT * count)
    top = np.sort(np.argpartition(costs, -size)[-size:])
    chosen, _ = first_distinct(points, top[np.argsort(-costs[top], kind="stable")], count)
    return points[np.resize(chosen, count)]


def first_distinct(
    points: npt.NDArray[np.float32], order: npt.NDArray[np.int64], num_rows: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The indices of the first `num_rows` distinct points in `order`, and a sorted array of distinct points.

    If there are more than `num_rows` distinct points, the array holds more than `num_rows` of them; else it holds all.
    """
    size = min(len(order), 2 * num_rows + 2)
    while True:
        # 0 is added because −0 and 0 are one point with two bit patterns.
        distinct, index = np.unique(points[order[:size]] + np.float32(0), axis=0, return_index=True)
        if len(distinct) > num_rows or size == len(order):
            return order[np.sort(index)[:num_rows]], distinct
        size = min(len(order), 4 * size)
