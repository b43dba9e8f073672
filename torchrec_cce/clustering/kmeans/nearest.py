"""Exact nearest centroid, by scores or by cells, whichever is faster for the table of centroids."""

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.kmeans.cells import Cells
from torchrec_cce.clustering.kmeans.scores import Scores
from torchrec_cce.errors import ClusteringError, ConfigError

# Nanoseconds a point on one Zen 5 core with AVX-512 (process time, medians, interleaved; Gaussian data; numba 0.68,
# FAISS 1.15 flat in one block of 65536 points):
#         k = 64      k = 500         k = 2048           k = 4096            k = 16384            k = 65536
#   d   loop FAISS  loop FAISS  loop cells FAISS   loop cells FAISS    loop cells FAISS    loop  cells  FAISS
#   2     10    50    24    69    65    30   113    119    30   174     457    33   517    1888     49   2029
#   4     13    60    34    84   102    74   141    205    88   239     780    96   789    2951    144   3027
#   8     20    61    65   103   207   266   222    389   432   339    1771   802  1396    6430   1894   6107
#   16    43    71   143   159                       845  2042   972    3374  8355  4336   13380  38679  24332
#   32    93    91   395   344
#   64   280   194   789   950
# FAISS also has two traps: a slow path for few points or one float, and cancellation far from the origin. In wide
# vectors most cells are near a point. So brute force takes wide vectors, and tables too small for cells to pay.
_CELLS_FROM = {1: 1024, 2: 1024, 3: 2048, 4: 2048, 5: 2048, 6: 4096, 7: 4096, 8: 8192, 9: 16384, 10: 16384}
"""Width → the number of centroids from which cells are faster than brute force; wider vectors never use cells."""


class NearestCentroid:
    """A table of centroids that answers which of them is nearest, for any number of points at a time.

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
        by_cells = self.num_centroids >= _CELLS_FROM.get(self.width, np.inf)
        self._search = Cells(centroids) if by_cells else Scores(centroids)

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
        self._search(points, codes, distances)
        bad = np.count_nonzero(~np.isfinite(distances))
        if bad:
            raise ClusteringError(
                f"{bad} of {len(points)} points are NaN, infinite or too far from every centroid for float32 squares"
            )
        return codes, distances
