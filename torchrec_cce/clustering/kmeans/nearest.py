"""Exact nearest centroid, by scores or by cells, whichever is faster for the table of centroids, or on a GPU."""

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.kmeans.cells import Cells
from torchrec_cce.clustering.kmeans.gpu import MIN_POINTS, gpu_search
from torchrec_cce.clustering.kmeans.scores import Scores
from torchrec_cce.errors import ClusteringError, ConfigError

# Nanoseconds a point on one Zen 3 core with AVX2 (process time, medians, interleaved; Gaussian data; numba 0.68,
# FAISS 1.15 flat in blocks large enough for its fast kernel):
#          k = 64        k = 512           k = 2048             k = 4096             k = 16384
#   d   scores FAISS  scores FAISS  scores cells FAISS   scores cells FAISS   scores cells FAISS
#   2       24    57      64   106     216    82   276      380    84   507     1255    81  1484
#   4       22    51      86   136     248   140   347      595   190   765     2302   225  2944
#   8       44    73     140   181     476   552   671     1156   898  1410     3522  1667  4492
#  16       63    89     244   338     923  2064  2486     1495  4443  3004     6431 22142 22880
#  32      158   180     565  1196    2013        4105
#  64      316   291    1184  1848    4092        6285
# Distances by brute force take 1.5 to 4 times as long as scores. In wide vectors most cells are near a point, so scores
# take those, and tables too small for cells to pay. Both give the same bits.
_CELLS_FROM = {1: 1024, 2: 1024, 3: 1024, 4: 2048, 5: 2048, 6: 2048, 7: 4096, 8: 8192, 9: 16384, 10: 16384}
"""Width → the number of centroids from which cells are faster than scores; wider vectors never use cells."""


class NearestCentroid:
    """A table of centroids that answers which of them is nearest, for any number of points at a time.

    The answer for a point is a function of that point and the centroids alone: the same bits in any batch, in any
    order, from any number of threads that share this object (it is read-only; the loops release the GIL and start no
    threads of their own).

    Where FAISS has a GPU, large searches are its, and points that it leaves undecided are the CPU's: the same bits.
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
        by_cells = self.num_centroids >= _CELLS_FROM.get(self.width, np.inf)
        self._search = Cells(centroids) if by_cells else Scores(centroids)
        self._on_gpu = gpu_search(centroids)

    def __call__(self, points: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """The nearest centroid of each of `points: [N, d] float32`.

        Of centroids that are equally near in float32, the first is taken.

        Returns:
            codes: [N] int64 in 0..k−1.
            distances: [N] float32, the squared Euclidean distances to those centroids. Their relative error is below
                `(d + 2)·2^-24` wherever the data lie.

        Raises:
            ConfigError: another shape or dtype.
            ClusteringError: points that are NaN, infinite, or so far away (≥ 1e19) that float32 cannot hold the square.
        """
        if points.ndim != 2 or points.shape[1] != self.width or points.dtype != np.float32:
            raise ConfigError(f"points are {points.dtype} {list(points.shape)}, not float32 [N, {self.width}]")
        points = np.ascontiguousarray(points)
        codes, distances = np.empty(len(points), np.int64), np.empty(len(points), np.float32)
        if self._on_gpu is None or len(points) < MIN_POINTS:
            self._search(points, codes, distances)
        else:
            undecided = self._on_gpu(points, codes, distances)
            rest = np.empty(len(undecided), np.int64), np.empty(len(undecided), np.float32)
            self._search(points[undecided], *rest)
            codes[undecided], distances[undecided] = rest
        bad = np.count_nonzero(~np.isfinite(distances))
        if bad:
            raise ClusteringError(
                f"{bad} of {len(points)} points are NaN, infinite or too far from every centroid for float32 squares"
            )
        return codes, distances
