"""k-means by our own loops, by FAISS or by scikit-learn, whose traps are avoided here."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.kmeans.gpu import gpu_index, num_gpus
from torchrec_cce.clustering.kmeans.lloyd import first_distinct, lloyd
from torchrec_cce.clustering.settings import Backend
from torchrec_cce.errors import ClusteringError, ConfigError
from torchrec_cce.extras import require

# FAISS's fused nearest-neighbour kernel is up to 70 times faster than its other one, but runs only when `queries · d`
# reaches this. A smaller training set is repeated until it does. The k-means is the same, as every cluster keeps its
# mean, and every size takes one code path that no thread count can change (the other is a threaded matrix product).
FUSED_MIN_FLOATS = 128_000
_SCALED_AT_A_TIME = 65536
_SKLEARN_ALONE = Lock()

_MODULES: dict[Backend, tuple[tuple[str, ...], ...]] = {
    "numba": (),
    "faiss": (("faiss", "cpu", "cuda"),),
    "sklearn": (("sklearn.cluster", "sklearn"), ("threadpoolctl", "sklearn")),
}
"""Back end → what it imports, each with the extras that bring it."""


def kmeans(
    points: npt.NDArray[np.float32],
    num_centroids: int,
    *,
    seed: int,
    weights: npt.NDArray[np.float32] | None = None,
    first: npt.NDArray[np.float32] | None = None,
    num_iterations: int = 50,
    num_threads: int = 1,
    backend: Backend = "numba",
) -> npt.NDArray[np.float32]:
    """Lloyd's k-means from distinct random points (the paper's setting: 50 iterations, lines 345 to 353).

    Every point is used, since the caller has sampled already. The result does not depend on `num_threads`.

    Args:
        points: [N, d] float32.
        num_centroids: `k`, at least 1.
        seed: chooses the first centroids; draw a new one for every clustering.
        weights: [N] float32, how often each point counts, at least 0. Points of weight 0 take no part.
        first: [k, d] float32, centroids to start from in place of random points.
        num_iterations: Lloyd iterations, at least 1; fewer are run once they change nothing any more.
        num_threads: threads. FAISS uses those of OpenMP, and the caller's setting is put back afterwards. scikit-learn
            uses one, because it adds up the sums of several threads in the order in which they end.
        backend: `"numba"`, our own loops; `"faiss"`, as good and slower, on this rank's GPU if FAISS sees one; or
            `"sklearn"`, the other library that the paper names (lines 321 to 324), in float64 and slower. From a start
            that leaves no cluster empty, all three find the same centroids. An empty cluster gets a point that costs
            much from `"numba"`, a point that is far away from `"sklearn"`, and half of a large cluster from `"faiss"`.

    Returns:
        centroids: [k', d] float32, with `k' = k`, unless at most `k` of the points are distinct: then the centroids are
        those `k'` points in lexicographic order, so that no assignment can pick an unused centroid.

    Raises:
        ConfigError: arguments of the wrong shape, dtype or sign, or no point of positive weight.
        ClusteringError: NaN or infinite points or weights; the message says how many.
        MissingExtraError: the backend is FAISS or scikit-learn, and that is not installed.
    """
    for name, value in (
        ("num_centroids", num_centroids),
        ("num_iterations", num_iterations),
        ("num_threads", num_threads),
    ):
        if value < 1:
            raise ConfigError(f"{name}={value} is not at least 1")
    if backend not in get_args(Backend):
        raise ConfigError(f"backend={backend!r} is not one of {get_args(Backend)}")
    if points.ndim != 2 or points.shape[1] == 0 or points.dtype != np.float32:
        raise ConfigError(f"points are {points.dtype} {list(points.shape)}, not float32 [N, d]")
    bad = np.count_nonzero(~np.isfinite(points).all(axis=1))
    if bad:
        raise ClusteringError(f"{bad} of {len(points)} points are NaN or infinite")
    if weights is not None:
        points, weights = _positive(points, weights)
    if len(points) == 0:
        raise ConfigError("k-means needs at least one point of positive weight")

    rng = np.random.default_rng(seed)
    chosen, distinct = first_distinct(points, _random_order(len(points), weights, rng), num_centroids)
    if len(distinct) <= num_centroids:
        return distinct
    first = points[chosen] if first is None else first
    # Squares of very small or very large values leave float32, and far from the origin FAISS's `‖x‖² − 2x·c + ‖c‖²`
    # cancels and picks wrong centroids. Neither happens to points around the origin, scaled exactly by a power of two.
    mean = points.mean(axis=0, dtype=np.float64)
    low, high = (bound(points, axis=0) for bound in (np.min, np.max))
    exponent = np.frexp(np.maximum(high - mean, mean - low).max())[1]
    scaled = np.empty(points.shape, np.float32)
    for start in range(0, len(points), _SCALED_AT_A_TIME):
        part = slice(start, start + _SCALED_AT_A_TIME)
        scaled[part] = np.ldexp(points[part] - mean, -exponent)
    # Centroids come to lie among the points; one that does not yet may lie outside what is scaled for.
    start_from = np.ldexp(np.clip(first, low, high) - mean, -exponent).astype(np.float32)
    weights = np.ones(len(points), np.float32) if weights is None else weights
    train = {"numba": lloyd, "faiss": _faiss, "sklearn": _sklearn}[backend]
    found = train(scaled, start_from, weights, num_iterations=num_iterations, num_threads=num_threads)
    centroids: npt.NDArray[np.float32] = (np.ldexp(found.astype(np.float64), exponent) + mean).astype(np.float32)
    return centroids


def modules_of(backend: Backend) -> tuple[Any, ...]:
    """Import what a back end needs; a run does this before it trains for hours.

    Raises:
        MissingExtraError: a module that the back end needs is not installed.
    """
    return tuple(require(*module) for module in _MODULES[backend])


def _positive(
    points: npt.NDArray[np.float32], weights: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The points of positive weight, and their weights divided by their mean."""
    if weights.shape != points.shape[:1]:
        raise ConfigError(f"weights have shape {list(weights.shape)} for {len(points)} points")
    bad = np.count_nonzero(~np.isfinite(weights))
    if bad:
        raise ClusteringError(f"{bad} of {len(weights)} weights are NaN or infinite")
    negative = np.count_nonzero(weights < 0)
    if negative:
        raise ConfigError(f"{negative} of {len(weights)} weights are negative")
    keep = weights > 0
    kept = weights[keep].astype(np.float64)
    # FAISS refills an empty cluster by drawing another with probability (size − 1) / (N − k). With a mean weight below
    # one these can all be negative, and the drawing never ends.
    return points[keep], (kept / kept.mean()).astype(np.float32) if len(kept) else weights[keep]


def _random_order(
    num_points: int, weights: npt.NDArray[np.float32] | None, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """A random order in which heavy points come early, as if drawn one by one with probabilities like the weights."""
    if weights is None:
        return rng.permutation(num_points)
    # Of independent exponential times with rates w, the next to ring is i with probability w_i / Σ w of those left.
    return np.argsort(rng.exponential(size=num_points) / weights)


def _faiss(
    points: npt.NDArray[np.float32],
    first: npt.NDArray[np.float32],
    weights: npt.NDArray[np.float32],
    *,
    num_iterations: int,
    num_threads: int,
) -> npt.NDArray[np.float32]:
    """Do what `lloyd` does, by FAISS; k < N, and the points lie around the origin."""
    (faiss,) = modules_of("faiss")
    num_rows, width = first.shape
    repeats = -(-FUSED_MIN_FLOATS // points.size)
    clustering = faiss.Clustering(width, num_rows)
    clustering.niter = num_iterations
    clustering.min_points_per_centroid = 1  # no warning
    clustering.max_points_per_centroid = len(points) * repeats  # no second sampling
    faiss.copy_array_to_vector(first.ravel(), clustering.centroids)
    index = gpu_index(faiss, width) if num_gpus(faiss) else faiss.IndexFlatL2(width)
    with _omp_threads(faiss, num_threads):
        clustering.train(np.tile(points, (repeats, 1)), index, np.tile(weights, repeats))
    centroids: npt.NDArray[np.float32] = faiss.vector_to_array(clustering.centroids).reshape(num_rows, width)
    return centroids


def _sklearn(
    points: npt.NDArray[np.float32],
    first: npt.NDArray[np.float32],
    weights: npt.NDArray[np.float32],
    *,
    num_iterations: int,
    num_threads: int,  # noqa: ARG001
) -> npt.NDArray[np.float32]:
    """Do what `lloyd` does, by scikit-learn; k < N, and the points lie around the origin.

    It computes in float64, because it finds distances as `‖c‖² − 2x·c`. Only one call runs at a time, because it sets
    the number of BLAS threads of the whole process, and sets it back.
    """
    cluster, threadpoolctl = modules_of("sklearn")
    model = cluster.KMeans(len(first), init=first.astype(np.float64), n_init=1, max_iter=num_iterations, tol=0)
    with _SKLEARN_ALONE, threadpoolctl.threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that some clusters are empty at the end
        model.fit(points.astype(np.float64), sample_weight=weights.astype(np.float64))
    centroids: npt.NDArray[np.float32] = model.cluster_centers_.astype(np.float32)
    return centroids


@contextmanager
def _omp_threads(faiss: Any, num_threads: int) -> Iterator[None]:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(num_threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
