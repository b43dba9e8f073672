"""murmur3's `fmix64` (Appleby 2011), a bijection of 64-bit words after which any set of keys looks random.

Modulo 2^64, and exactly undone by `unmix64`:

    x ← (x ⊕ (x >> 33)) · 0xff51afd7ed558ccd
    x ← (x ⊕ (x >> 33)) · 0xc4ceb9fe1a85ec53
    x ← x ⊕ (x >> 33)
"""

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from torchrec_cce.jit import jit

Words = TypeVar("Words", np.uint64, npt.NDArray[np.uint64])

SHIFT = 33
FACTORS = 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53
_SHIFT = np.uint64(SHIFT)
_FIRST, _SECOND = map(np.uint64, FACTORS)
_UNDO_FIRST, _UNDO_SECOND = (np.uint64(pow(factor, -1, 2**64)) for factor in FACTORS)


def mixed(x: Words) -> Words:
    """Every word of an array, mixed."""
    x = (x ^ (x >> _SHIFT)) * _FIRST
    x = (x ^ (x >> _SHIFT)) * _SECOND
    x ^= x >> _SHIFT
    return x


fmix64 = jit(mixed)
"""One word, for compiled loops."""


@jit
def unmix64(x: np.uint64) -> np.uint64:
    """The word of which `x` is the `fmix64`."""
    x = (x ^ (x >> _SHIFT)) * _UNDO_SECOND
    x = (x ^ (x >> _SHIFT)) * _UNDO_FIRST
    x ^= x >> _SHIFT
    return x
