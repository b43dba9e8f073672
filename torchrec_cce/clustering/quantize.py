"""Product and residual quantization: pointers and codewords learned from all embeddings of a trained table."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.kmeans.kmeans import kmeans
from torchrec_cce.clustering.kmeans.nearest import NearestCentroid
from torchrec_cce.clustering.sample import training_sample
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.errors import ConfigError
from torchrec_cce.hashing import derive_seed

_IDS_AT_A_TIME = 65536


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantized:
    """What an embedding is made of: in each column, the sum of the codewords that its pointers name."""

    pointers: npt.NDArray[np.int64]
    """[n, c, t]."""
    codewords: npt.NDArray[np.float32]
    """[c, t, k, d/c]; rows that no pointer names are 0."""


def quantize(
    embeddings: npt.NDArray[np.float32],
    *,
    num_columns: int,
    num_terms: int,
    num_rows: int,
    seed: int,
    settings: ReclusterConfig,
    circular: bool = False,
) -> Quantized:
    """Cluster each column, then what is left of it, and so on: `t = 1` is product quantization (Jégou et al. 2011),
    `c = 1` residual quantization (Chen et al. 2010).

    Args:
        embeddings: [n, d] float32, of all IDs.
        num_columns: `c`, a divisor of d.
        num_terms: `t`.
        num_rows: `k`: centroids of each clustering.
        settings: of k-means, which sees at most `points_per_centroid · k` IDs.
        circular: cluster a column by the *other* columns, and take means of its own for codewords. The pointers of all
            columns come out alike: it collapses (Appendix A and G). Here to be shown, not to be used.

    Raises:
        ConfigError: columns that do not divide d; circular clustering of one column, or in several terms.
        ClusteringError: NaN or infinite embeddings.
    """
    n, d = embeddings.shape
    if num_columns < 1 or d % num_columns:
        raise ConfigError(f"num_columns={num_columns} does not divide the {d} dimensions of the embeddings")
    if circular and (num_columns < 2 or num_terms > 1):
        raise ConfigError(
            f"num_columns={num_columns}, num_terms={num_terms}: circular clustering is of 2 columns or more, of one "
            "term each"
        )
    columns = embeddings.reshape(n, num_columns, -1)
    pointers = np.empty((n, num_columns, num_terms), np.int64)
    codewords = np.zeros((num_columns, num_terms, num_rows, d // num_columns), np.float32)
    for j in range(num_columns):
        left = columns[:, j].copy()
        for p in range(num_terms):
            seen = np.delete(columns, j, axis=1).reshape(n, -1) if circular else left
            centroids, codes = _cluster(seen, num_rows, seed=derive_seed(seed, j, p), settings=settings)
            codeword = _means(left, codes, len(centroids)) if circular else centroids
            pointers[:, j, p], codewords[j, p, : len(codeword)] = codes, codeword
            left -= codeword[codes]
    return Quantized(pointers=pointers, codewords=codewords)


def _cluster(
    points: npt.NDArray[np.float32], num_rows: int, *, seed: int, settings: ReclusterConfig
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Centroids [k', w], k' ≤ k, and the nearest one of each of `points: [n, w]`."""
    sample, _ = training_sample(
        len(points), settings.points_per_centroid * num_rows, frequencies=None, seed=derive_seed(seed, "sample")
    )
    centroids = kmeans(
        points[sample],
        num_rows,
        seed=derive_seed(seed, "kmeans"),
        num_iterations=settings.num_iterations,
        backend=settings.backend,
    )
    nearest = NearestCentroid(centroids)
    parts = [nearest(points[start : start + _IDS_AT_A_TIME])[0] for start in range(0, len(points), _IDS_AT_A_TIME)]
    return centroids, np.concatenate(parts)


def _means(points: npt.NDArray[np.float32], codes: npt.NDArray[np.int64], num_rows: int) -> npt.NDArray[np.float32]:
    """[k, w]: of the points of each code; 0 where there are none."""
    counts = np.bincount(codes, minlength=num_rows)
    sums = np.stack([np.bincount(codes, column, minlength=num_rows) for column in points.T.astype(np.float64)], axis=1)
    means: npt.NDArray[np.float32] = (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
    return means
