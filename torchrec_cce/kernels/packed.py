"""The pointers of an ID as machine words, so that a loop moves them whole instead of one by one.

The loops that gather them are bounds checked. A map is far larger than any cache, so a loop is as fast as the cache
lines that it keeps on their way. Each returns the index of the first position that is outside `0..n - 1`, or -1; for
such a position it reads nothing and writes zero.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from torchrec_cce.hashing import UniversalHash, fmix64, hash_mixed
from torchrec_cce.jit import jit, prefetch

_WORD_BYTES = 8
# The distance from the prefetch of a word to its load: more than memory can have on its way, so that it never runs dry,
# and small enough that the lines are still in the nearest cache when the loop arrives.
_AHEAD = 96
_LINE_BYTES = 64
# IDs that are hashed column by column, mixed and packed in the nearest cache.
_BLOCK = 256


def as_packed(pointers: npt.NDArray[np.unsignedinteger]) -> npt.NDArray[np.unsignedinteger]:
    """View `pointers: [n, c] uint8/16/32`, C-contiguous, as the widest words that divide a row. Nothing is copied.

    Returns `[n]` where a row is one word and `[n, w]` where it is several, uint8 to uint64; column 0 is in the lowest
    bits. Four uint16 are one uint64, six are three uint32, five are themselves. In a buffer that does not start at a
    multiple of a word's size, as at an odd place in a file, the next narrower word that does is taken, at the narrowest
    the pointers themselves. `packed.view(pointers.dtype).reshape(pointers.shape)` are the pointers again.
    """
    assert pointers.flags.c_contiguous
    row_bytes = pointers.shape[1] * pointers.itemsize
    packed = pointers
    for size in (8, 4, 2):
        if size > pointers.itemsize and row_bytes % size == 0:
            wider = pointers.view(f"u{size}")
            if wider.flags.aligned:
                packed = wider
                break
    return packed.reshape(-1) if packed.shape[1] == 1 else packed


@jit
def gather_words(
    words: npt.NDArray[np.unsignedinteger], positions: npt.NDArray[np.int64], out: npt.NDArray[np.unsignedinteger]
) -> int:
    """`out[i] = words[positions[i]]`. `words: [n]` and `out: [N]` of the same unsigned dtype, `positions: [N]`."""
    count = len(positions)
    assert len(out) == count
    limit = np.uint64(len(words))
    bad = -1
    main = max(count - _AHEAD, 0)
    # The last positions have no successor to prefetch: they prefetch themselves, which costs less than a condition.
    for start, stop, ahead in ((0, main, _AHEAD), (main, count, 0)):
        for i in range(start, stop):
            prefetch(words, positions[i + ahead])
            x = np.uint64(positions[i])
            if x < limit:  # a negative number is a huge unsigned one
                out[i] = words[x]
            else:
                out[i] = 0
                if bad < 0:
                    bad = i
    return bad


@jit
def gather_rows(
    rows: npt.NDArray[np.unsignedinteger], positions: npt.NDArray[np.int64], out: npt.NDArray[np.unsignedinteger]
) -> int:
    """`out[i] = rows[positions[i]]`. `rows: [n, w]`, C-contiguous, of any unsigned dtype; `positions: [N]`.

    `out: [N, w]`, of the dtype of `rows`. Every cache line of a row is prefetched: a row that lies on two lines would
    otherwise wait for the second.
    """
    count = len(positions)
    width = rows.shape[1]
    assert out.shape == (count, width)
    limit = np.uint64(len(rows))
    flat = rows.reshape(-1)
    line = _LINE_BYTES // rows.itemsize
    bad = -1
    main = max(count - _AHEAD, 0)
    for start, stop, ahead in ((0, main, _AHEAD), (main, count, 0)):
        for i in range(start, stop):
            first = positions[i + ahead] * width
            for j in range(0, width, line):
                prefetch(flat, first + j)
            prefetch(flat, first + width - 1)
            x = np.uint64(positions[i])
            if x < limit:
                for j in range(width):
                    out[i, j] = rows[x, j]
            else:
                for j in range(width):
                    out[i, j] = 0
                if bad < 0:
                    bad = i
    return bad


@jit
def packed_hashes(
    ids: npt.NDArray[np.integer],
    multipliers: npt.NDArray[np.uint64],
    offsets: npt.NDArray[np.uint64],
    num_rows: int,
    code_bits: int,
    out: npt.NDArray[np.uint64],
) -> None:
    """Hash `ids: [N]` by `c` functions `multipliers, offsets: [c]` to codes of `code_bits` (4, 8, 16 or 32) bits each.

    `out: [w, N]`: `64 // code_bits` codes a word, the first in the lowest bits; bits that no code fills are zero.
    """
    k = np.uint64(num_rows)
    codes_a_word, bits = np.uint64(64 // code_bits), np.uint64(code_bits)
    count, num_columns = np.uint64(len(ids)), np.uint64(len(multipliers))
    # Column by column of a block, so that the CPU hashes several IDs at once.
    mixed, packed = np.empty(_BLOCK, np.uint64), np.empty(_BLOCK, np.uint64)
    for start in range(np.uint64(0), count, np.uint64(_BLOCK)):
        size = min(np.uint64(_BLOCK), count - start)
        for i in range(size):
            mixed[i] = fmix64(np.uint64(ids[start + i]))
        for word in range(np.uint64(len(out))):
            first = word * codes_a_word
            for i in range(size):
                packed[i] = 0
            for j in range(first, min(first + codes_a_word, num_columns)):
                multiplier, offset, shift = multipliers[j], offsets[j], (j - first) * bits
                for i in range(size):
                    packed[i] |= hash_mixed(mixed[i], multiplier, offset, k) << shift
            for i in range(size):
                out[word, start + i] = packed[i]


def num_words(num_columns: int, code_bits: int) -> int:
    """How many 64-bit words hold `c` codes of so many bits."""
    return -(-num_columns * code_bits // (8 * _WORD_BYTES))


def hashed_words(ids: npt.NDArray[np.int64], functions: UniversalHash, code_bits: int) -> list[npt.NDArray[np.uint64]]:
    """The codes that `functions` hash `ids: [N]` to, of 4, 8, 16 or 32 bits side by side: [N] uint64 each."""
    out = np.empty((num_words(functions.num_columns, code_bits), len(ids)), np.uint64)
    packed_hashes(ids, functions.multipliers, functions.offsets, functions.num_rows, code_bits, out)
    return list(out)


def pack(codes: npt.NDArray[np.unsignedinteger]) -> list[npt.NDArray[np.uint64]]:
    """`codes: [N, c]` uint8/16/32 as 64-bit words, [N] uint64 each: column 0 in the lowest bits, zeros at the end."""
    count, num_columns = codes.shape
    words = np.zeros((count, num_words(num_columns, 8 * codes.itemsize)), "<u8")
    words.view(codes.dtype.newbyteorder("<"))[:, :num_columns] = codes
    return [np.ascontiguousarray(word, np.uint64) for word in words.T]


def unpack(
    words: Sequence[npt.NDArray[np.uint64]], *, num_columns: int, dtype: npt.DTypeLike
) -> npt.NDArray[np.unsignedinteger]:
    """The codes, [N, c] of `dtype`, that `pack` made `words: [N] uint64` each of."""
    kind: np.dtype[Any] = np.dtype(dtype)
    stacked = np.ascontiguousarray(np.stack(words, axis=1), dtype="<u8")
    codes = stacked.view(kind.newbyteorder("<"))[:, :num_columns]
    return np.ascontiguousarray(codes, dtype=kind)


def as_uint64s(packed: npt.NDArray[np.unsignedinteger], item: np.dtype[Any]) -> list[npt.NDArray[np.uint64]]:
    """What `as_packed` made of an ID's pointers, which are stored as `item`, as `pack` packs them.

    Where those are the same words, at most their width changes.
    """
    if packed.ndim == 2 and packed.dtype != np.uint64:
        return pack(packed.view(item.base).reshape(len(packed), *item.shape))
    if packed.ndim == 1:
        return [packed.astype(np.uint64, copy=False)]
    return [np.ascontiguousarray(packed[:, word]) for word in range(packed.shape[1])]
