"""The pointers of an ID as machine words, so that a loop moves them whole instead of one by one."""

import numpy as np
import numpy.typing as npt

from torchrec_cce.hashing import hash_one
from torchrec_cce.jit import jit


def as_words(pointers: npt.NDArray[np.unsignedinteger]) -> npt.NDArray[np.unsignedinteger]:
    """View `pointers: [n, c] uint8/16/32`, C-contiguous, as the widest words that divide a row. Nothing is copied.

    Returns `[n]` where a row is one word and `[n, w]` where it is several, uint8 to uint64; column 0 is in the lowest
    bits. Four uint16 are one uint64, six are three uint32, five are themselves. In a buffer that does not start at a
    multiple of a word's size, as at an odd place in a file, the next narrower word that does is taken, at the narrowest
    the pointers themselves. `words.view(pointers.dtype).reshape(pointers.shape)` are the pointers again.
    """
    assert pointers.flags.c_contiguous
    row_bytes = pointers.shape[1] * pointers.itemsize
    words = pointers
    for size in (8, 4, 2):
        if size > pointers.itemsize and row_bytes % size == 0:
            wider = pointers.view(f"u{size}")
            if wider.flags.aligned:
                words = wider
                break
    return words.reshape(-1) if words.shape[1] == 1 else words


@jit
def packed_hashes(
    ids: npt.NDArray[np.int64],
    multipliers: npt.NDArray[np.uint64],
    offsets: npt.NDArray[np.uint64],
    num_rows: int,
    code_bits: int,
    out: npt.NDArray[np.uint64],
) -> None:
    """Hash `ids: [N]` by `c` functions `multipliers, offsets: [c]` to codes of `code_bits` (8, 16 or 32) bits each.

    `out: [w, N]`: `64 // code_bits` codes a word, the first in the lowest bits; bits that no code fills are zero.
    """
    k = np.uint64(num_rows)
    per_word = 64 // code_bits
    for word in range(len(out)):
        first = word * per_word
        last = min(first + per_word, len(multipliers))
        for i in range(len(ids)):
            x = np.uint64(ids[i])
            packed = np.uint64(0)
            for j in range(first, last):
                code = hash_one(x, multipliers[j], offsets[j], k)
                packed |= code << np.uint64((j - first) * code_bits)
            out[word, i] = packed
