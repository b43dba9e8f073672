"""Rows of int8 or float16 numbers that are pooled, and trained by row-wise Adagrad with stochastic rounding.

Numba has no float16: such numbers are uint16 here, which have their bits.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from torchrec_cce.hashing import fmix64
from torchrec_cce.jit import jit, prefetch

LARGEST = 127
"""The largest absolute value of an int8 number: the negative side has none that the positive lacks."""

Numbers = npt.NDArray[np.int8] | npt.NDArray[np.uint16]
Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
_DRAW_BITS = 24
_DRAW = np.float32(2.0**-_DRAW_BITS)
_FIRST_DRAW, _SECOND_DRAW = np.uint64(64 - _DRAW_BITS), np.uint64(64 - 2 * _DRAW_BITS)
_DRAW_MASK = np.uint64((1 << _DRAW_BITS) - 1)
_ONE = np.uint64(1)
_FOUR = np.uint64(4)
_AHEAD = np.uint64(16)
"""Rows are asked for so long before they are needed: no cache holds a table."""

# A float16 has a sign, 5 bits of exponent and 10 of mantissa; a float32 has 13 more of mantissa, and an exponent that
# is 112 larger for the same value. Below the exponent 1, float16 numbers are multiples of 2⁻²⁴.
_CUT = 13
_CUT_MASK = (1 << _CUT) - 1
_BIAS = 112 << 10
_SIGN = 0x8000
_FIRST_NORMAL = 0x400
_INFINITE = 0x7C00
_NOT_A_NUMBER = 0x7E00
_SMALLEST_NORMAL = np.float32(2.0**-14)
_UNIT = np.float32(2.0**-24)
_PARTS = np.float32(2.0 ** (24 + _DRAW_BITS))
"""Of a unit there are as many parts as different draws."""


@jit
def _float_of_half(half: np.uint16) -> np.float32:
    """The value of a float16 number, NaN for infinity. There is no branch, so that compiled it does several at once."""
    magnitude = np.uint32(half & (_SIGN - 1))
    small = np.float32(np.float32(np.int32(magnitude)) * _UNIT).view(np.uint32)
    normal = np.uint32((magnitude + _BIAS) << _CUT)
    bits = normal if magnitude >= _FIRST_NORMAL else small
    bits = bits if magnitude < _INFINITE else np.uint32((_NOT_A_NUMBER + 2 * _BIAS) << _CUT)
    value: np.float32 = np.uint32(bits | ((half & _SIGN) << 16)).view(np.float32)
    return value


@jit
def _half_of(value: np.float32, draw: np.int32) -> np.uint16:
    """One of the two float16 numbers around `value`, by chance, so that the mean is `value`; NaN for NaN.

    Args:
        draw: 24 random bits. They are added to the bits that are cut off, of which there are 13, but more near 0.
    """
    magnitude = np.float32(abs(value))
    if value != value:
        half = np.int64(_NOT_A_NUMBER)
    elif magnitude < _SMALLEST_NORMAL:
        half = (np.int64(magnitude * _PARTS) + np.int64(draw)) >> _DRAW_BITS
    else:
        raised = np.int64(magnitude.view(np.uint32)) + (np.int64(draw) & _CUT_MASK)
        half = min((raised >> _CUT) - _BIAS, _INFINITE - 1)
    if value < np.float32(0):
        half |= _SIGN
    drawn: np.uint16 = np.uint16(half)
    return drawn


@jit
def _drawn_byte(value: np.float32, draw: np.int32) -> np.int8:
    """One of the two int8 numbers around `value`, by chance, so that the mean is `value`.

    Args:
        draw: 24 random bits.
    """
    rounded = np.floor(value + np.float32(draw) * _DRAW)
    drawn: np.int8 = np.int8(min(max(rounded, np.float32(-LARGEST)), np.float32(LARGEST)))
    return drawn


@jit
def _draw_for_row(seed: np.uint64, row: np.uint64, draws: npt.NDArray[np.int32]) -> None:
    """Fill in the 24 random bits for each number of a row: `draws: [d]`, with room for one more where `d` is odd.

    A hash gives two, for numbers that are half a row apart.
    """
    half = np.uint64(len(draws)) >> _ONE
    for at in range(half):
        bits = fmix64(seed ^ (row * half + at))
        draws[at] = np.int32(bits >> _FIRST_DRAW)
        draws[half + at] = np.int32((bits >> _SECOND_DRAW) & _DRAW_MASK)


@jit
def _mean_square(values: Floats) -> np.float32:
    """Of `values: [d]`, in four sums, which are added up at once; the result depends on this order."""
    width = np.uint64(len(values))
    fours = width & ~np.uint64(3)
    first = second = third = fourth = np.float32(0)
    for at in range(np.uint64(0), fours, _FOUR):
        first += values[at] * values[at]
        second += values[at + 1] * values[at + 1]
        third += values[at + 2] * values[at + 2]
        fourth += values[at + 3] * values[at + 3]
    for at in range(fours, width):
        first += values[at] * values[at]
    mean: np.float32 = ((first + second) + (third + fourth)) / np.float32(width)
    return mean


class QuantizedArray:
    """Rows, `[m, d]`, that become float32 where they are asked for. A view: it changes with the rows."""

    def __init__(self, numbers: npt.NDArray[np.int8] | npt.NDArray[np.float16], step: float) -> None:
        self._numbers, self._step = numbers, np.float32(step)
        self.shape = numbers.shape

    def __getitem__(self, rows: Any) -> Floats:
        part: Floats = self._numbers[rows] * self._step
        return part


@jit
def pool_rows(
    rows: Numbers,
    step: np.float32,
    slots: Integers,
    lengths: npt.NDArray[np.integer],
    weights: Floats,
    first: int,
    stride: int,
    out: Floats,
    starts: Integers,
) -> None:
    """Write the weighted sums of the rows of bags into `out`.

    Args:
        rows: [m, d], of which each number stands for itself times `step`, which is 1 for float16.
        slots: [R], each inside, bag after bag.
        lengths: [B].
        weights: [R], or [0] where all are 1.
        first, stride, out: the sum of bag `i` goes to `out[first + i · stride:]`.
        starts: [R], to write to: where in `out` the sum that each row is part of begins.
    """
    is_half = rows.itemsize == 2
    width = np.uint64(rows.shape[1])
    count = np.uint64(len(slots))
    at, start = np.uint64(0), np.uint64(first)
    for bag in range(len(lengths)):
        for dim in range(width):
            out[start + dim] = np.float32(0)
        stop = at + np.uint64(lengths[bag])
        while at < stop:
            if at + _AHEAD < count:
                prefetch(rows, slots[at + _AHEAD])
            starts[at] = start
            slot = np.uint64(slots[at])
            weight = step * weights[at] if len(weights) else step
            if is_half:
                for dim in range(width):
                    out[start + dim] += weight * _float_of_half(np.uint16(rows[slot, dim]))
            else:
                for dim in range(width):
                    out[start + dim] += weight * np.float32(rows[slot, dim])
            at += _ONE
        start += np.uint64(stride)


@jit
def train_rows(
    rows: Numbers,
    state: Floats,
    step: np.float32,
    order: Integers,
    slots: Integers,
    starts: Integers,
    weights: Floats,
    gradients: Floats,
    learning_rate: np.float32,
    weight_decay: np.float32,
    epsilon: np.float32,
    seed: np.uint64,
) -> None:
    """One step of row-wise Adagrad, on the sum of the gradients of each row; between two numbers, it is drawn for one.

    Args:
        rows, step: see `pool_rows`; rows are written to.
        state: [m], each row's sum of mean squared gradients; written to.
        order: [R] indices that sort `slots` stably.
        slots, weights, starts: see `pool_rows`.
        gradients: those of `out` there.
        weight_decay: a row that is trained is first multiplied by `1 − learning_rate · weight_decay`.
        seed: of the draws; a new one for every step.
    """
    is_half = rows.itemsize == 2
    width = np.uint64(rows.shape[1])
    count = np.uint64(len(order))
    kept = np.float32(1) - learning_rate * weight_decay
    total, draws = np.empty(width, np.float32), np.empty(width + width % 2, np.int32)
    at = np.uint64(0)
    while at < count:
        if at + _AHEAD < count:
            prefetch(rows, slots[order[at + _AHEAD]])
            prefetch(state, slots[order[at + _AHEAD]])
        slot = np.uint64(slots[order[at]])
        total[:] = np.float32(0)
        while at < count and np.uint64(slots[order[at]]) == slot:
            member = np.uint64(order[at])
            weight = weights[member] if len(weights) else np.float32(1)
            start = np.uint64(starts[member])
            for dim in range(width):
                total[dim] += weight * gradients[start + dim]
            at += _ONE
        state[slot] += _mean_square(total)
        rate = learning_rate / (np.sqrt(state[slot]) + epsilon) / step
        _draw_for_row(seed, slot, draws)
        if is_half:
            for dim in range(width):
                value = kept * _float_of_half(np.uint16(rows[slot, dim])) - rate * total[dim]
                rows[slot, dim] = _half_of(value, draws[dim])
        else:
            for dim in range(width):
                value = kept * np.float32(rows[slot, dim]) - rate * total[dim]
                rows[slot, dim] = _drawn_byte(value, draws[dim])


@jit
def round_rows(values: Floats, step: np.float32, first: int, seed: np.uint64, out: Numbers) -> None:
    """Write the numbers that stand for `values: [N, d]` to `out: [N, d]`, rounded up or down as is drawn.

    Args:
        step: see `pool_rows`.
        first: the row of a table that comes first in `values`.
        seed: of the draws.
    """
    is_half = out.itemsize == 2
    width = values.shape[1]
    draws = np.empty(width + width % 2, np.int32)
    for i in range(len(values)):
        _draw_for_row(seed, np.uint64(first + i), draws)
        if is_half:
            for dim in range(width):
                out[i, dim] = _half_of(values[i, dim], draws[dim])
        else:
            for dim in range(width):
                out[i, dim] = _drawn_byte(values[i, dim] / step, draws[dim])
