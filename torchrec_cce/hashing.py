"""Seeded universal hashing of raw IDs to rows, with the same bits in numpy, numba and torch (`methods.computed`).

The ID is mixed by `fmix64` (see below), then comes multiply-shift (Dietzfelbinger et al. 1997) to 32 bits, then
Lemire's fast range to any `k ≤ 2^32`:

    h(x) = ((((a·fmix64(x) + b) mod 2^64) >> 32) · k) >> 32,    a odd

Any 64-bit ID is hashed as its two's complement, so `-1` and `2^64 - 1` are one key. Two different IDs collide with
probability at most about `2/k` over the choice of `(a, b)`, which is all that a count sketch asks for (Appendix C of
the CCE paper): mixing is a bijection. Multiply-shift alone would do for one function, but maps the IDs `0, 1, 2, …` to
a lattice, and so several functions to pairs of rows of which far fewer than by chance differ.

murmur3's `fmix64` (Appleby 2011) is a bijection of 64-bit words after which any set of keys looks random. It is modulo
2^64, and `unmix64` undoes it exactly:

    x ← (x ⊕ (x >> 33)) · 0xff51afd7ed558ccd
    x ← (x ⊕ (x >> 33)) · 0xc4ceb9fe1a85ec53
    x ← x ⊕ (x >> 33)
"""

import hashlib
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from torchrec_cce.errors import ConfigError
from torchrec_cce.jit import jit

HASH_NAME = "fmix64, multiply-shift"
"""Part of every map's digest: weights that were trained under other functions do not load."""
MAX_ROWS = 2**32


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from a path of names and numbers, e.g. `derive_seed(7, "t_user", "helper", 3)`.

    SHA-256 of the parts, so that seeds do not depend on a library's version and nearby paths share nothing.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@jit
def hash_mixed(mixed: np.uint64, multiplier: np.uint64, offset: np.uint64, num_rows: np.uint64) -> np.uint64:
    """`h(x)` where `mixed` is `fmix64(x)`."""
    row: np.uint64 = (((mixed * multiplier + offset) >> np.uint64(32)) * num_rows) >> np.uint64(32)
    return row


@jit
def hash_one(x: np.uint64, multiplier: np.uint64, offset: np.uint64, num_rows: np.uint64) -> np.uint64:
    """`h(x)` for compiled loops, which mix an ID once for all functions. Arguments and result are uint64."""
    return hash_mixed(fmix64(x), multiplier, offset, num_rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class UniversalHash:
    """`c` independent hash functions onto `num_rows` rows each."""

    multipliers: npt.NDArray[np.uint64]
    """[c] uint64, odd."""
    offsets: npt.NDArray[np.uint64]
    """[c] uint64."""
    num_rows: int
    """`k`: the size of the range, 1 to 2^32."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_rows <= MAX_ROWS:
            raise ConfigError(f"num_rows={self.num_rows} is not in 1..2^32")
        if self.multipliers.shape != self.offsets.shape or self.multipliers.ndim != 1:
            raise ConfigError(f"shapes {self.multipliers.shape} and {self.offsets.shape} are not one [c]")

    @classmethod
    def from_seed(cls, seed: int, *, num_columns: int, num_rows: int) -> "UniversalHash":
        """The functions that `seed` stands for. The first columns do not depend on how many there are."""
        digests = [hashlib.sha256(f"{seed}/{column}".encode()).digest() for column in range(num_columns)]
        words = np.frombuffer(b"".join(digest[:16] for digest in digests), dtype="<u8").reshape(num_columns, 2)
        return cls(
            multipliers=words[:, 0].astype(np.uint64) | np.uint64(1),
            offsets=words[:, 1].astype(np.uint64),
            num_rows=num_rows,
        )

    @property
    def num_columns(self) -> int:
        return len(self.multipliers)

    def numpy(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Hash `ids: [N] int64` (any value) to rows `[N, c] int64`."""
        spread = mixed(ids.astype(np.uint64))[:, None] * self.multipliers + self.offsets
        rows: npt.NDArray[np.uint64] = (spread >> np.uint64(32)) * np.uint64(self.num_rows) >> np.uint64(32)
        return rows.astype(np.int64)


def term_hash(seed: int, term: int, *, num_columns: int, num_rows: int) -> UniversalHash:
    """The hash functions of one term of a table: the same for every method, so that CCE starts as CE hybrid."""
    return UniversalHash.from_seed(derive_seed(seed, "term", term), num_columns=num_columns, num_rows=num_rows)


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
