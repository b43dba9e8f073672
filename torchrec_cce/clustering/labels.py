"""Numbers for new clusters that keep what can be kept: k-means numbers them by chance."""

import numpy as np
import numpy.typing as npt

from torchrec_cce.jit import jit


def match_labels(
    old: npt.NDArray[np.int64], new: npt.NDArray[np.int64], weights: npt.NDArray[np.float64], *, num_labels: int
) -> npt.NDArray[np.int64]:
    """An order of the new labels in which as many points as can easily be had keep their old label.

    The pairs of an old and a new label are taken from the heaviest down, where both are still free: at least half of
    what the best matching keeps. Labels left over fill the gaps in ascending order.

    Args:
        old: [m] int64; labels that are not below `num_labels` match nothing.
        new: [m] int64, below `num_labels`.
        weights: [m], positive.
        num_labels: k'.

    Returns:
        order: [k'] int64, a permutation: the new label that gets each number.
    """
    keys, inverse = np.unique(old * num_labels + new, return_inverse=True)
    overlaps = np.bincount(inverse.ravel(), weights)
    heaviest = keys[np.argsort(-overlaps, kind="stable")]
    order = np.full(num_labels, -1, np.int64)
    taken = np.zeros(num_labels, np.bool_)
    _take_free(heaviest, order, taken)
    order[order < 0] = np.flatnonzero(~taken)
    return order


@jit
def _take_free(keys: npt.NDArray[np.int64], order: npt.NDArray[np.int64], taken: npt.NDArray[np.bool_]) -> None:
    num_labels = len(order)
    for key in keys:
        number, label = key // num_labels, key % num_labels
        if number < num_labels and order[number] < 0 and not taken[label]:
            order[number] = label
            taken[label] = True
