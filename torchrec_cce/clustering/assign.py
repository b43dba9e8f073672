"""Exact nearest centroid."""

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from torchrec_cce.clustering.loops import nearest_loop, pack_centroids
from torchrec_cce.errors import ClusteringError, ConfigError

# Nanoseconds a point on one Zen 5 core with AVX-512 (process time, medians, interleaved; Gaussian data; numba 0.68,
# FAISS 1.15 flat in one block of 65536 points, SciPy 1.17):
#            k = 64        k = 256        k = 500        k = 4096         k = 16384     k = 32768      k = 65536
#   d      loop FAISS    loop FAISS     loop FAISS     loop  FAISS       loop  tree    loop   tree    loop   tree
#   2        10    50      19    62       24    69      141    186        645   672    1283    859    2406   1073
#   4        13    60      22    66       34    84      215    251        811   958    2052   1669    3923   2202
#   8        20    61      40    75       65   103      424    409       1666 10346    3464  14331    8710  24449
#   16       43    71      86    98      143   159      926   1126
#   32       93    91     187   192      395   344     2539   3277
#   64      280   194     565   444      789   950     5338   7489
# FAISS is nowhere clearly ahead where columns are narrow, and has two traps (a slow path for few points, cancellation
# far from the origin); so the loop takes all but the corner where a k-d tree wins.
_TREE_MAX_WIDTH = 4
_TREE_MIN_ROWS = 16385


class NearestCentroid:
    """Which centroid is nearest, for any number of points at a time.

    The answer for a point is a function of that point and the centroids alone: the same bits in any batch, in any
    order, from any number of threads that share this object (it is read-only; the loops release the GIL and start no
    threads of their own).
    """

    def __init__(self, centroids: npt.NDArray[np.float32]) -> None:
        """Prepare `centroids: [k, d] float32`, k and d at least 1.

        Raises:
            ConfigError: another shape or dtype.
            ClusteringError: NaN or infinite centroids.
        """
        if centroids.ndim != 2 or 0 in centroids.shape or centroids.dtype != np.float32:
            raise ConfigError(f"centroids are {centroids.dtype} {list(centroids.shape)}, not float32 [k, d]")
        bad = np.count_nonzero(~np.isfinite(centroids).all(axis=1))
        if bad:
            raise ClusteringError(f"{bad} of {len(centroids)} centroids are NaN or infinite")
        self.num_centroids, self.width = centroids.shape
        self._tree: Any = None
        if self.width <= _TREE_MAX_WIDTH and self.num_centroids >= _TREE_MIN_ROWS:
            self._tree = cKDTree(centroids)
        else:
            self._packed = pack_centroids(centroids)
            self._loop = nearest_loop(self.width)

    def __call__(self, points: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """The nearest centroid of each of `points: [N, d] float32`.

        Of centroids equally near, the first, where the loop answers; the k-d tree picks one of them, always the same.

        Returns:
            codes: [N] int64 in 0..k−1.
            distances: [N] float32, the squared Euclidean distance to that centroid; its relative error is below
                `(d + 2)·2^-24` wherever the data lie.

        Raises:
            ConfigError: another shape or dtype.
            ClusteringError: points that are NaN, infinite, or so far away (≥ 1e19) that float32 cannot hold the square.
        """
        if points.ndim != 2 or points.shape[1] != self.width or points.dtype != np.float32:
            raise ConfigError(f"points are {points.dtype} {list(points.shape)}, not float32 [N, {self.width}]")
        if self._tree is not None:
            _check_finite(np.isfinite(points).all(axis=1))
            lengths, found = self._tree.query(points)
            codes, distances = found.astype(np.int64, copy=False), np.square(lengths).astype(np.float32)
        else:
            codes, distances = np.empty(len(points), np.int64), np.empty(len(points), np.float32)
            self._loop(np.ascontiguousarray(points), self._packed, codes, distances)
        _check_finite(np.isfinite(distances))
        return codes, distances


def _check_finite(finite: Any) -> None:
    if not finite.all():
        bad = np.count_nonzero(~finite)
        raise ClusteringError(
            f"{bad} of {len(finite)} points are NaN, infinite or too far from every centroid for float32 squares"
        )
