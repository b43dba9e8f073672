"""Optimizers' steps on the rows of a table that a batch has touched, whose gradient is left zero for the next.

A row whose gradient is zero is not touched, as by FBGEMM's exact optimizers: its state and its weights stay.
"""

import numpy as np
import numpy.typing as npt

from torchrec_cce.jit import jit
from torchrec_cce.kernels.lookup.vectors import add_scaled, load_row, store_row, zero_row

Floats = npt.NDArray[np.float32]


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
        weights, gradients: [n, w], state: [n]; C-contiguous, all written to.
        width: as long as `w` is, so that every width is compiled by itself: rows of CCE tables are short.
    """
    of_weights, of_gradients = np.uint64(weights.ctypes.data), np.uint64(gradients.ctypes.data)
    row_bytes = np.uint64(len(width) * 4)
    for row in range(np.uint64(len(weights))):
        squares = np.float32(0)
        for at in range(np.uint64(len(width))):
            squares += gradients[row, at] * gradients[row, at]
        if squares != 0:  # NaN, too, is passed on
            state[row] += squares / np.float32(len(width))
            step = rate / (np.sqrt(state[row]) + epsilon)
            weight, gradient = of_weights + row * row_bytes, of_gradients + row * row_bytes
            store_row(weight, add_scaled(load_row(weight, width), load_row(gradient, width), -step))
            store_row(gradient, zero_row(width))


@jit
def adagrad(weights: Floats, gradients: Floats, state: Floats, rate: np.float32, epsilon: np.float32) -> None:
    """`s += g²`, `w -= rate · g / (√s + ε)`, element by element, as PyTorch's `Adagrad`.

    Args:
        weights, gradients, state: [n, w]; all written to.
    """
    for row in range(len(weights)):
        for at in range(weights.shape[1]):
            gradient = gradients[row, at]
            if gradient != 0:
                state[row, at] += gradient * gradient
                weights[row, at] -= rate * gradient / (np.sqrt(state[row, at]) + epsilon)
                gradients[row, at] = 0


@jit
def sgd(weights: Floats, gradients: Floats, rate: np.float32) -> None:
    """`w -= rate · g`. `weights, gradients: [n, w]`, both written to."""
    for row in range(len(weights)):
        for at in range(weights.shape[1]):
            weights[row, at] -= rate * gradients[row, at]
            gradients[row, at] = 0
