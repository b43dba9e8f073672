"""Which IDs train the centroids."""

import numpy as np
import numpy.typing as npt


def training_sample(
    num_ids: int, max_ids: int, *, frequencies: npt.NDArray[np.float64] | None, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """At most `max_ids` IDs of `0 … num_ids − 1`, ascending and distinct, and how often each counts.

    Without frequencies: every ID once, or one drawn uniformly from each of `max_ids` equal ranges. With `frequencies:
    [num_ids]`, not negative, not all zero: every ID that was seen, weighted by its frequency, if those are few enough;
    else `max_ids` draws proportional to frequency, one from each of as many equal ranges of the cumulated frequency,
    and repeats become weights. Never-seen IDs do not train. (One draw a range, and not so many independent draws: no
    ID comes twice without frequencies, nothing of size `num_ids` is shuffled, and the variance is lower.)

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
    if np.count_nonzero(frequencies) <= max_ids:
        seen = np.flatnonzero(frequencies)
        return seen, frequencies[seen]
    cumulated = np.cumsum(frequencies)
    draws = (np.arange(max_ids) + rng.random(max_ids)) / max_ids * cumulated[-1]
    # From the right: ID i takes cumulated[i − 1] ≤ draw < cumulated[i], an empty interval if its frequency is zero.
    # A draw that rounds up to the very end belongs to the last ID that was seen.
    drawn = np.searchsorted(cumulated, draws, side="right")
    drawn = np.minimum(drawn, np.searchsorted(cumulated, cumulated[-1], side="left"))
    ids, repeats = np.unique(drawn, return_counts=True)
    return ids, repeats.astype(np.float64)
