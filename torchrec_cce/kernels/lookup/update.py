"""An optimizer's step on a table with a dense gradient, in one pass.

A row whose gradient is zero stays as it is, state and weights, as with FBGEMM's exact optimizers.
"""

import numpy as np
import numpy.typing as npt

from torchrec_cce.jit import jit
from torchrec_cce.kernels.lookup.vectors import add_scaled, load_row, store_row, sum_of_squares

Floats = npt.NDArray[np.float32]


_BLOCK = 64
"""Rows: what a block takes of the step is in the nearest cache, and its divisions and roots are vectors."""


@jit
def rowwise_adagrad(
    weights: Floats,
    gradients: Floats,
    state: Floats,
    rate: np.float32,
    epsilon: np.float32,
    width: tuple[None, ...],
) -> None:
    """`s += mean(g²)`, `w -= rate · g / (√s + ε)`: FBGEMM's exact row-wise Adagrad, and TorchRec's `RowWiseAdagrad`.

    Args:
        weights: [n, w], written to; gradients: [n, w]; state: [n], written to; all C-contiguous.
        width: as long as `w` is, so that every width is compiled by itself: rows of CCE tables are short.
    """
    of_weights, of_gradients = np.uint64(weights.ctypes.data), np.uint64(gradients.ctypes.data)
    row_bytes, count = np.uint64(len(width) * 4), np.uint64(len(weights))
    zero = np.float32(0)
    squares, steps = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float32)
    for first in range(np.uint64(0), count, np.uint64(_BLOCK)):
        size = min(np.uint64(_BLOCK), count - first)
        num_touched = 0
        for row in range(size):
            squares[row] = sum_of_squares(load_row(of_gradients + (first + row) * row_bytes, width))
            num_touched += squares[row] != 0  # NaN, too, is passed on
        for row in range(size):
            # `/` would look for zeros, one by one.
            total = state[first + row] + np.divide(squares[row], np.float32(len(width)))
            step = np.divide(-rate, np.sqrt(total) + epsilon)
            state[first + row] = total
            steps[row] = step if squares[row] != 0 else zero
        # Among many touched rows the others are stepped by nothing, which takes less than to find out about each.
        is_dense = num_touched > _BLOCK // 8
        for row in range(size):
            if is_dense or squares[row] != 0:
                at = (first + row) * row_bytes
                weight, gradient = load_row(of_weights + at, width), load_row(of_gradients + at, width)
                store_row(of_weights + at, add_scaled(weight, gradient, steps[row]))
