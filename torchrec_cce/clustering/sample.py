"""Which IDs train the centroids."""

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.frequencies import Frequencies


def training_sample(
    num_ids: int, max_ids: int, *, frequencies: Frequencies | None, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """At most `max_ids` IDs of `0 … num_ids − 1`, ascending and distinct, and how often each counts.

    Without frequencies: every ID once, or one drawn uniformly from each of `max_ids` equal ranges. With frequencies:
    every ID that was seen, weighted by its frequency, if those are few enough; else `max_ids` draws proportional to
    frequency, one from each of as many equal ranges of the cumulated frequency, and repeats become weights. Never-seen
    IDs do not train. (One draw a range, and not so many independent draws: no ID comes twice without frequencies,
    nothing of size `num_ids` is shuffled, and the variance is lower.)

    Returns:
        ids: [m] int64.
        weights: [m] float64, positive.
    """
    rng = np.random.default_rng(seed)
    if frequencies is None:
        if num_ids <= max_ids:
            return np.arange(num_ids), np.ones(num_ids)
        edges = np.arange(max_ids + 1) * num_ids // max_ids
        return rng.integers(edges[:-1], edges[1:]), np.ones(max_ids)
    if frequencies.num_seen <= max_ids:
        return frequencies.seen()
    shares = (np.arange(max_ids) + rng.random(max_ids)) / max_ids
    ids, repeats = np.unique(frequencies.at(shares), return_counts=True)
    return ids, repeats.astype(np.float64)
