"""Which positions of a map have a private row, and which: a bitmap with counts, looked up bag by bag."""

import numpy as np
import numpy.typing as npt

from torchrec_cce.hashing import fmix64
from torchrec_cce.jit import jit

BITS = 64
"""Positions in a word of the bitmap."""
NEVER = 255
"""The age of a position that never had a row."""
OLDEST = 254
"""The largest age of one that had."""
DIGIT_BITS = 16
"""Ranks are compared digit by digit, the highest first."""
ANYBODY, SEEN, ARRIVED = 0, 1, 2
"""Who may get a row: all positions; those with a frequency above 0; of these, those that never had one."""
_TIE_BITS = 16
_HIGHEST_SCORE = (1 << (64 - _TIE_BITS)) - 1

_ZERO: np.uint64 = np.uint64(0)
_ONE = np.uint64(1)
_WORD = np.uint64(6)
_IN_WORD = np.uint64(BITS - 1)


@jit
def _count_ones(x: np.uint64) -> np.int64:
    """The bits of a word that are set."""
    x -= (x >> _ONE) & np.uint64(0x5555555555555555)
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    count: np.int64 = np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))
    return count


@jit
def slot_of(position: np.uint64, words: npt.NDArray[np.uint64], before: npt.NDArray[np.uint32]) -> np.int64:
    """The slot of a position, -1 if it has none. Every argument must be inside."""
    at = position >> _WORD
    word, bit = words[at], _ONE << (position & _IN_WORD)
    slot: np.int64 = np.int64(-1)
    if word & bit != 0:
        slot = np.int64(before[at]) + _count_ones(word & (bit - _ONE))
    return slot


@jit
def fill_bitmap(ages: npt.NDArray[np.uint8], words: npt.NDArray[np.uint64], before: npt.NDArray[np.uint32]) -> int:
    """Set the bits of the positions whose age is 0, and count those before each word, and all: the result.

    Args:
        ages: [n] uint8.
        words, before: [⌈n/64⌉], to write to.
    """
    count = 0
    for at in range(len(words)):
        before[at] = count
        word = np.uint64(0)
        for position in range(at * BITS, min((at + 1) * BITS, len(ages))):
            if ages[position] == 0:
                word |= _ONE << np.uint64(position % BITS)
                count += 1
        words[at] = word
    return count


@jit
def order_of_arrival(
    before: npt.NDArray[np.uint8],
    after: npt.NDArray[np.uint8],
    known: npt.NDArray[np.uint32],
    first: int,
    out: npt.NDArray[np.uint32],
) -> None:
    """The rows of all positions whose age `after: [n]` is 0: those that they had `before: [n]`, and the next ones.

    Args:
        known, out: the rows of those of age 0 before, and after, in ascending order of positions; `out` to write to.
        first: of the next ones.
    """
    number, old, new = 0, 0, first
    for position in range(len(after)):
        if before[position] == 0:
            out[number] = known[old]
            old += 1
            number += 1
        elif after[position] == 0:
            out[number] = new
            new += 1
            number += 1


@jit
def slots_of(
    positions: npt.NDArray[np.int64],
    words: npt.NDArray[np.uint64],
    before: npt.NDArray[np.uint32],
    out: npt.NDArray[np.int64],
) -> None:
    """The slots of `positions: [N]`, each inside; -1 for those without one."""
    for i in range(len(positions)):
        out[i] = slot_of(np.uint64(positions[i]), words, before)


@jit
def slots_of_bags(
    positions: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.integer],
    words: npt.NDArray[np.uint64],
    before: npt.NDArray[np.uint32],
    slots: npt.NDArray[np.int64],
    places: npt.NDArray[np.int64],
    counts: npt.NDArray[np.integer],
) -> int:
    """The slots of the members of bags that have one, bag after bag; returns how many those are.

    Args:
        positions: [N], -1 for what has no position.
        lengths: [B], of the bags; they add up to N.
        slots, places: [N], to write to: the slot, and the index of its position in `positions`.
        counts: [B], to write to: members of each bag that have a slot.
    """
    found = i = 0
    for bag in range(len(lengths)):
        first = found
        for _ in range(lengths[bag]):
            if positions[i] >= 0:
                slot = slot_of(np.uint64(positions[i]), words, before)
                if slot >= 0:
                    slots[found] = slot
                    places[found] = i
                    found += 1
            i += 1
        counts[bag] = found - first
    return found


@jit
def _rank_of(
    i: int,
    ages: npt.NDArray[np.uint8],
    frequencies: npt.NDArray[np.integer],
    first: int,
    never: np.uint64,
    seed: np.uint64,
    who: int,
) -> np.uint64:
    """Where a position stands among those that want a row: 48 bits of `(frequency + 1)·age²`, 16 of a draw.

    At least 1, or 0 if it may not get one. It is the position `first + i`; the other arguments are those of
    `count_digits`.
    """
    frequency = np.int64(frequencies[i]) if len(frequencies) else np.int64(0)
    if (who != ANYBODY and frequency == 0) or (who == ARRIVED and ages[i] != NEVER):
        return _ZERO
    waiting = never if ages[i] == NEVER else np.uint64(ages[i])
    score = (np.uint64(frequency) + _ONE) * waiting * waiting
    score = min(score, np.uint64(_HIGHEST_SCORE))
    draw = fmix64(np.uint64(first + i) ^ seed) >> np.uint64(64 - _TIE_BITS)
    rank: np.uint64 = max((score << np.uint64(_TIE_BITS)) | draw, _ONE)
    return rank


@jit
def count_digits(
    ages: npt.NDArray[np.uint8],
    frequencies: npt.NDArray[np.integer],
    first: int,
    never: np.uint64,
    seed: np.uint64,
    who: int,
    prefix: np.uint64,
    shift: np.uint64,
    counts: npt.NDArray[np.int64],
) -> None:
    """Count the digits at `shift` of the ranks of some positions whose higher digits are `prefix`.

    Args:
        ages: [m] uint8, of the positions from `first` on.
        frequencies: [m] at least 0, or [0] where they are not known.
        never: the age that counts for a position that never had a row.
        who: may get a row.
        counts: [2^16], added to.
    """
    for i in range(len(ages)):
        rank = _rank_of(i, ages, frequencies, first, never, seed, who)
        above = rank >> shift
        if above >> np.uint64(DIGIT_BITS) == prefix:
            counts[above & np.uint64((1 << DIGIT_BITS) - 1)] += 1


@jit
def admit_above(
    ages: npt.NDArray[np.uint8],
    frequencies: npt.NDArray[np.integer],
    first: int,
    never: np.uint64,
    seed: np.uint64,
    who: int,
    threshold: np.uint64,
    out: npt.NDArray[np.uint8],
) -> None:
    """The ages of some positions after an admission: 0 for ranks of `threshold` and above, all others a phase older,
    unless the admission is one of those who arrived in a phase.

    Arguments as of `count_digits`; `out: [m]` may be `ages`.
    """
    for i in range(len(ages)):
        if _rank_of(i, ages, frequencies, first, never, seed, who) >= threshold:
            out[i] = 0
        elif ages[i] == NEVER or who == ARRIVED:
            out[i] = ages[i]
        else:
            out[i] = min(np.int64(ages[i]) + 1, OLDEST)
