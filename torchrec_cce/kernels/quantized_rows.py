"""Rows of int8 numbers that are pooled, and trained by row-wise Adagrad with stochastic rounding."""

from typing import Any

import numpy as np
import numpy.typing as npt

from torchrec_cce.hashing import fmix64
from torchrec_cce.jit import jit

LARGEST = 127
"""The largest absolute value of a number: the negative side has none that the positive lacks."""

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
_DRAW_BITS = 24
_DRAW = np.float32(2.0**-_DRAW_BITS)
_DRAW_SHIFT = np.uint64(64 - _DRAW_BITS)


class QuantizedArray:
    """Rows, `[m, d]`, that become float32 where they are asked for. A view: it changes with the rows."""

    def __init__(self, numbers: npt.NDArray[np.int8], step: float) -> None:
        self._numbers, self._step = numbers, np.float32(step)
        self.shape = numbers.shape

    def __getitem__(self, rows: Any) -> Floats:
        part: Floats = self._numbers[rows] * self._step
        return part


@jit
def pool_rows(
    rows: npt.NDArray[np.int8],
    step: np.float32,
    slots: Integers,
    lengths: npt.NDArray[np.integer],
    weights: Floats,
    out: Floats,
) -> None:
    """Add the weighted sums of the rows of bags to `out`.

    Args:
        rows: [m, d], of which each number stands for itself times `step`.
        slots: [R], each inside, bag after bag.
        lengths: [B].
        weights: [R], or [0] where all are 1.
        out: [B, d].
    """
    at = 0
    for bag in range(len(lengths)):
        for _ in range(lengths[bag]):
            weight = step * weights[at] if len(weights) else step
            for dim in range(rows.shape[1]):
                out[bag, dim] += weight * np.float32(rows[slots[at], dim])
            at += 1


@jit
def train_rows(
    rows: npt.NDArray[np.int8],
    state: Floats,
    step: np.float32,
    order: Integers,
    slots: Integers,
    bags: Integers,
    weights: Floats,
    gradients: Floats,
    learning_rate: np.float32,
    weight_decay: np.float32,
    epsilon: np.float32,
    seed: np.uint64,
) -> None:
    """One step of row-wise Adagrad, on the sum of the gradients of each row; what does not fit a step is drawn for.

    Args:
        rows, step: see `pool_rows`; rows are written to.
        state: [m], each row's sum of mean squared gradients; written to.
        order: [R] indices that sort `slots` stably.
        slots, weights: see `pool_rows`.
        bags: [R], the row of `gradients` of each.
        gradients: [B, d].
        weight_decay: a row that is trained is first multiplied by `1 − learning_rate · weight_decay`.
        seed: of the draws; a new one for every step.
    """
    width = rows.shape[1]
    total = np.empty(width, np.float32)
    start = 0
    while start < len(order):
        slot = slots[order[start]]
        total[:] = np.float32(0)
        stop = start
        while stop < len(order) and slots[order[stop]] == slot:
            at = order[stop]
            weight = weights[at] if len(weights) else np.float32(1)
            for dim in range(width):
                total[dim] += weight * gradients[bags[at], dim]
            stop += 1
        squares = np.float32(0)
        for dim in range(width):
            squares += total[dim] * total[dim]
        state[slot] += squares / np.float32(width)
        rate = learning_rate / (np.sqrt(state[slot]) + epsilon) / step
        kept = np.float32(1) - learning_rate * weight_decay
        for dim in range(width):
            bits = fmix64(seed ^ np.uint64(slot * width + dim)) >> _DRAW_SHIFT
            value = kept * np.float32(rows[slot, dim]) - rate * total[dim] + np.float32(bits) * _DRAW
            rows[slot, dim] = np.int8(min(max(np.floor(value), np.float32(-LARGEST)), np.float32(LARGEST)))
        start = stop


@jit
def round_rows(values: Floats, step: np.float32, first: int, seed: np.uint64, out: npt.NDArray[np.int8]) -> None:
    """Write the numbers that stand for `values: [N, d]` to `out: [N, d]`, rounded up or down as is drawn.

    Args:
        step: what 1 stands for.
        first: the row of a table that comes first in `values`.
        seed: of the draws.
    """
    width = values.shape[1]
    for i in range(len(values)):
        for dim in range(width):
            bits = fmix64(seed ^ np.uint64((first + i) * width + dim)) >> _DRAW_SHIFT
            value = np.floor(values[i, dim] / step + np.float32(bits) * _DRAW)
            out[i, dim] = np.int8(min(max(value, np.float32(-LARGEST)), np.float32(LARGEST)))
