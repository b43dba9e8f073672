"""Figure 5: k-means factors a matrix into a tall sparse and a small dense one."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from torchrec_cce.clustering.kmeans.kmeans import kmeans
from torchrec_cce.clustering.kmeans.nearest import NearestCentroid


@dataclass(frozen=True, kw_only=True, eq=False)
class Factors:
    """`T ≈ H M`."""

    sparse: csr_array
    """H: [n, k], a single 1 in each row: the cluster of that row of T."""
    dense: npt.NDArray[np.float32]
    """M: [k, d], the centroids."""

    def product(self) -> npt.NDArray[np.float32]:
        """[n, d]."""
        product: npt.NDArray[np.float32] = self.sparse @ self.dense
        return product


def factorize(matrix: npt.NDArray[np.float32], num_clusters: int, *, seed: int) -> Factors:
    """Factor `matrix: [n, d] float32` by k-means. Raises as `kmeans`."""
    centroids = kmeans(matrix, num_clusters, seed=seed)
    codes, _ = NearestCentroid(centroids)(matrix)
    ones = np.ones(len(matrix), np.float32)
    sparse = csr_array((ones, codes, np.arange(len(matrix) + 1)), shape=(len(matrix), len(centroids)))
    return Factors(sparse=sparse, dense=centroids)
