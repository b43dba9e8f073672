"""A read-only hash table from 64-bit keys to positions: the compiled loops that build it and that look keys up.

A key's hash is murmur3's `fmix64(key XOR seed)`, a bijection of 64-bit words. A bucket is 4 slots, which is one cache
line. A key's bucket is `hash · num_buckets >> 64`, which grows with the hash, and its home is that bucket's first slot.
The keys lie in the order of their hashes, each in the first free slot from its home on:
`slot_i = max(slot_{i-1} + 1, home_i)`. So the table depends on its keys, their positions and the seed alone, and not on
how it was built. The taken slots of a bucket are its first ones, and a probe goes on to the next bucket only where all
4 are taken. Nothing wraps around: the table is as long as the last key needs, and its last slot is empty, so that every
probe ends.

A slot is {key, position}, and an empty slot is {0, -1}: no key is reserved. In a worked example, the keys a to f have
the homes 0, 0, 0, 0, 0 and 4 in 2 buckets, and lie as `a b c d  e f - -`.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from torchrec_cce.hashing import fmix64, unmix64
from torchrec_cce.jit import jit, prefetch

BUCKET = 4
"""Slots of a bucket: 64 bytes."""

# The number of keys between the prefetch of a bucket and its read, and the number of keys that are finished together:
# one in ten is not in its first bucket, and they all wait for their next ones at the same time. Measured on Zen 5 and a
# table of 10^7 keys.
_AHEAD, _TOGETHER = 64, 512

_1, _2, _3, _4 = map(np.uint64, range(1, 5))


@intrinsic  # type: ignore[untyped-decorator]
def _high_word(_typing_context: Any, _a: Any, _b: Any) -> Any:
    """`a · b >> 64` of two uint64: one instruction, and exact for any number of buckets."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(argument, wide) for argument in arguments))
        return builder.trunc(builder.lshr(product, wide(64)), ir.IntType(64))

    return types.uint64(types.uint64, types.uint64), generate


@jit
def mix(key: np.int64, seed: np.uint64) -> np.uint64:
    """The hash of one key, for compiled loops."""
    return fmix64(np.uint64(key) ^ seed)


@jit
def unmix(hashed: np.uint64, seed: np.uint64) -> np.int64:
    """The key whose hash is `hashed`."""
    key: np.int64 = np.int64(unmix64(hashed) ^ seed)
    return key


@jit
def _position_in_bucket(slots: npt.NDArray[np.int64], at: np.uint64, key: np.int64) -> np.int64:
    """The position of `key` if it is in the bucket at slot `at`, else -1, without a branch: none could be predicted."""
    # The first match counts: an empty slot shows 0, but comes after all taken ones, and its position is -1 anyway.
    match = _3
    match = _2 if slots[at + _2, 0] == key else match
    match = _1 if slots[at + _1, 0] == key else match
    match = np.uint64(0) if slots[at, 0] == key else match
    position: np.int64 = slots[at + match, 1] | (np.int64(slots[at + match, 0] == key) - 1)
    return position


@jit
def _step(keys: npt.NDArray[np.int64], slots: npt.NDArray[np.int64], out: npt.NDArray[np.int64], i: int) -> bool:
    """Look for key `i` in the bucket at slot `out[i]`, and write its position, or -1 if it is nowhere, to `out[i]`.

    Returns True if the key may be in the next bucket: that is then prefetched, and its slot written to `out[i]`.
    """
    at = np.uint64(out[i])
    position = _position_in_bucket(slots, at, keys[i])
    goes_on = (position < 0) & (slots[at + _3, 1] >= 0)
    following = np.int64(at + _4 * np.uint64(goes_on))
    prefetch(slots, following)  # always, because a condition is a branch; mostly it is the bucket just read
    out[i] = following if goes_on else position
    return bool(goes_on)


@jit
def lookup_positions(
    keys: npt.NDArray[np.int64],
    slots: npt.NDArray[np.int64],
    num_buckets: int,
    seed: int,
    out: npt.NDArray[np.int64],
) -> int:
    """Write the position of each key, or -1 if it is not in the table, and return how many are not.

    `keys, out: [N]`, not overlapping; `slots: [S, 2]`, S a multiple of 4 and at least `4 · num_buckets`, the last one
    empty: then no key makes it read out of bounds.
    """
    count = len(keys)
    buckets, salt = np.uint64(num_buckets), np.uint64(seed)
    # Until the position of a key is known, `out` holds the bucket that was prefetched for it.
    for i in range(min(_AHEAD, count)):
        home = np.int64(_high_word(mix(keys[i], salt), buckets) * _4)
        prefetch(slots, home)
        out[i] = home
    unseen = 0
    unfinished = np.empty(_TOGETHER, np.int64)
    for start in range(0, count, _TOGETHER):
        stop = min(start + _TOGETHER, count)
        num_unfinished = 0
        for i in range(start, stop):
            if i + _AHEAD < count:
                home = np.int64(_high_word(mix(keys[i + _AHEAD], salt), buckets) * _4)
                prefetch(slots, home)
                out[i + _AHEAD] = home
            unfinished[num_unfinished] = i
            num_unfinished += _step(keys, slots, out, i)
        while num_unfinished > 0:
            still = 0
            for i in unfinished[:num_unfinished]:
                unfinished[still] = i
                still += _step(keys, slots, out, i)
            num_unfinished = still
        for i in range(start, stop):
            unseen += out[i] < 0
    return unseen


@jit
def keys_by_position(slots: npt.NDArray[np.int64], out: npt.NDArray[np.int64]) -> bool:
    """Write each key of `slots: [S, 2]` to its position of `out: [n]`.

    Returns whether there are `n` keys and each has a position in 0..n - 1. A key with another position is left out.
    """
    inside = taken = 0
    for at in range(len(slots)):
        position = slots[at, 1]
        taken += position != -1
        if 0 <= position < len(out):
            out[position] = slots[at, 0]
            inside += 1
    return inside == len(out) and taken == len(out)


@jit
def count_blocks(
    keys: npt.NDArray[np.int64], num_buckets: int, seed: int, shift: int, counts: npt.NDArray[np.int64]
) -> None:
    """Add to `counts[b]` the keys of block `b`: of the buckets `b·2^shift` to `(b + 1)·2^shift - 1`."""
    buckets, salt, bits = np.uint64(num_buckets), np.uint64(seed), np.uint64(shift)
    for i in range(len(keys)):
        counts[_high_word(mix(keys[i], salt), buckets) >> bits] += 1


@jit
def scatter_blocks(
    keys: npt.NDArray[np.int64],
    first_position: int,
    num_buckets: int,
    seed: int,
    shift: int,
    cursors: npt.NDArray[np.int64],
    pairs: npt.NDArray[np.int64],
) -> None:
    """Write {hash, position} of `keys: [N]`, whose positions start at `first_position`, to `pairs: [n, 2]`.

    Each goes where the cursor of its block is; `cursors: [blocks]` move past what is written.
    """
    buckets, salt, bits = np.uint64(num_buckets), np.uint64(seed), np.uint64(shift)
    for i in range(len(keys)):
        hashed = mix(keys[i], salt)
        block = _high_word(hashed, buckets) >> bits
        to = cursors[block]
        cursors[block] = to + 1
        pairs[to, 0] = np.int64(hashed)
        pairs[to, 1] = first_position + i


@jit
def sort_block(pairs: npt.NDArray[np.int64], num_buckets: int, first_bucket: int, width: int, max_run: int) -> bool:
    """Sort {hash, position} `pairs: [m, 2]` of the buckets `first_bucket..+ width - 1` by hash, as unsigned, in place.

    Returns False, and leaves them as they are, if more than `max_run` are of one bucket: so no sort takes more than
    `m · max_run` steps, whoever chose the keys.
    """
    buckets = np.uint64(num_buckets)
    starts = np.zeros(width + 1, np.int64)
    for i in range(len(pairs)):
        starts[np.int64(_high_word(np.uint64(pairs[i, 0]), buckets)) - first_bucket + 1] += 1
    for bucket in range(width):
        if starts[bucket + 1] > max_run:
            return False
        starts[bucket + 1] += starts[bucket]
    unsorted = pairs.copy()
    ends = starts[:-1].copy()
    for i in range(len(pairs)):
        hashed = np.uint64(unsorted[i, 0])
        bucket = np.int64(_high_word(hashed, buckets)) - first_bucket
        to = ends[bucket]
        ends[bucket] = to + 1
        while to > starts[bucket] and np.uint64(pairs[to - 1, 0]) > hashed:
            pairs[to, 0] = pairs[to - 1, 0]
            pairs[to, 1] = pairs[to - 1, 1]
            to -= 1
        pairs[to, 0] = unsorted[i, 0]
        pairs[to, 1] = unsorted[i, 1]
    return True


@jit
def place(pairs: npt.NDArray[np.int64], num_buckets: int, seed: int, max_run: int, slots: npt.NDArray[np.int64]) -> int:
    """Fill the table from {hash, position} `pairs: [n, 2]` in the order of their hashes, all different.

    `slots: [4 · num_buckets + max_run, 2]`, `max_run` a multiple of 4; the table is the first S of them. Returns S; or
    -1 if two hashes are equal or more than `max_run` slots in a row are taken, which is how far a probe would walk.
    """
    buckets, salt = np.uint64(num_buckets), np.uint64(seed)
    free = run_start = 0
    for i in range(len(pairs)):
        hashed = np.uint64(pairs[i, 0])
        home = BUCKET * np.int64(_high_word(hashed, buckets))
        if home > free:
            slots[free:home, 0] = 0
            slots[free:home, 1] = -1
            free = run_start = home
        if free - run_start >= max_run or (i > 0 and pairs[i, 0] == pairs[i - 1, 0]):
            return -1
        slots[free, 0] = unmix(hashed, salt)
        slots[free, 1] = pairs[i, 1]
        free += 1
    size = BUCKET * max(num_buckets, free // BUCKET + 1)
    slots[free:size, 0] = 0
    slots[free:size, 1] = -1
    return size
