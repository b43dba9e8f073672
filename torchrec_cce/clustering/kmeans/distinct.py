"""The first distinct points in an order."""

import numpy as np
import numpy.typing as npt


def first_distinct(
    points: npt.NDArray[np.float32], order: npt.NDArray[np.int64], num_rows: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Indices of the first `num_rows` distinct points in `order`, and distinct points, sorted.

    The latter are more than `num_rows` if there are more; else they are all there are.
    """
    size = min(len(order), 2 * num_rows + 2)
    while True:
        # 0 is added because −0 and 0 are one point with two bit patterns.
        distinct, index = np.unique(points[order[:size]] + np.float32(0), axis=0, return_index=True)
        if len(distinct) > num_rows or size == len(order):
            return order[np.sort(index)[:num_rows]], distinct
        size = min(len(order), 4 * size)
