"""How the codes of an ID are stored: each in 8, 16 or 32 bits, or two in a byte.

Two codes a byte: that of column 2j is in the low four bits of byte j, that of column 2j + 1 in the high ones. With an
odd number of columns, the last four bits are zero.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from torchrec_cce.errors import ConfigError

PointerType = Literal["uint4", "uint8", "uint16", "uint32"]
"""What files call the formats."""
MinPointerBits = Literal[4, 8]
"""The fewest bits that a pointer takes, however few `num_rows` needs."""

CODES_AT_A_TIME = 1 << 16
"""IDs whose codes are held decoded at a time, where many are encoded or counted."""


class Codes(Protocol):
    """`[n, c]` codes, to be read a part at a time: an array, or `Nibbles`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def max(self) -> Any: ...

    def __getitem__(self, key: Any, /) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class PointerFormat:
    """How the `c` codes of an ID are stored: as `width` numbers of `dtype`.

    Raises:
        ConfigError: there is no such format; a single column takes at least 8 bits.
    """

    num_columns: int
    """`c`."""
    bits: int
    """Of a code: 4, 8, 16 or 32."""

    def __post_init__(self) -> None:
        if self.bits not in (4, 8, 16, 32) or self.num_columns < 1 + self.nibbles:
            raise ConfigError(f"no pointers are of {self.bits} bits in {self.num_columns} columns")

    @classmethod
    def that_holds(cls, num_rows: int, *, num_columns: int, min_bits: MinPointerBits = 8) -> "PointerFormat":
        """The fewest bits that hold `0 … num_rows − 1`, at least `min_bits`; 4 only where a byte then has two codes."""
        least = 8 if num_columns == 1 else min_bits
        bits = next(bits for bits in (4, 8, 16, 32) if bits >= least and num_rows <= 2**bits)
        return cls(num_columns=num_columns, bits=bits)

    @classmethod
    def named(cls, name: PointerType, *, num_columns: int) -> "PointerFormat":
        return cls(num_columns=num_columns, bits=int(name.removeprefix("uint")))

    @classmethod
    def of_type(cls, kind: pa.FixedSizeListType, *, num_columns: int) -> "PointerFormat | None":
        """The format that is stored as this type; None if there is none."""
        wanted = (kind.value_type, kind.list_size)
        formats = (cls(num_columns=num_columns, bits=bits) for bits in (4, 8, 16, 32)[num_columns == 1 :])
        return next((f for f in formats if (pa.from_numpy_dtype(f.dtype), f.width) == wanted), None)

    @property
    def name(self) -> PointerType:
        return f"uint{self.bits}"  # type: ignore[return-value]

    @property
    def nibbles(self) -> bool:
        """Whether there are two codes in a byte."""
        return self.bits == 4

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Of the numbers that are stored, and of codes."""
        return np.dtype(f"u{max(1, self.bits // 8)}")

    @property
    def width(self) -> int:
        """Numbers that are stored for an ID."""
        return -(-self.num_columns // 2) if self.nibbles else self.num_columns

    @property
    def item(self) -> np.dtype[Any]:
        """What is stored for an ID, as one dtype."""
        return np.dtype((self.dtype, (self.width,)))

    @property
    def num_bytes(self) -> int:
        """Of an ID."""
        return self.width * self.dtype.itemsize

    @property
    def arrow_type(self) -> pa.FixedSizeListType:
        return pa.list_(pa.from_numpy_dtype(self.dtype), self.width)

    def encode(self, codes: npt.NDArray[np.integer]) -> npt.NDArray[np.unsignedinteger]:
        """`codes: [N, c]`, all of which the format holds, as they are stored: [N, width]."""
        if not self.nibbles:
            return codes.astype(self.dtype, copy=False)
        stored = codes[:, 0::2].astype(self.dtype)
        stored[:, : self.num_columns // 2] |= codes[:, 1::2].astype(self.dtype) << 4
        return stored

    def decode(self, stored: npt.NDArray[np.unsignedinteger]) -> npt.NDArray[np.unsignedinteger]:
        """[N, c] of `dtype`: the codes that `encode` made `stored: [N, width]` of; a copy of those of 4 bits."""
        if not self.nibbles:
            return stored
        codes = np.empty((len(stored), self.num_columns), self.dtype)
        np.bitwise_and(stored, 15, out=codes[:, 0::2])
        np.right_shift(stored[:, : self.num_columns // 2], 4, out=codes[:, 1::2])
        return codes

    def codes(self, stored: npt.NDArray[np.unsignedinteger]) -> Codes:
        """`stored: [n, width]` to be read as codes. Nothing is copied."""
        return Nibbles(stored, self) if self.nibbles else stored

    def parts_to_fill(
        self, stored: npt.NDArray[np.unsignedinteger]
    ) -> Iterator[tuple[int, npt.NDArray[np.unsignedinteger]]]:
        """Parts of `stored: [n, width]` as [m, c] codes to write to, each with its first row, one after the other.

        Whoever takes them writes all codes of a part before taking the next, and takes all.
        """
        if not self.nibbles:
            yield 0, stored
            return
        for start in range(0, max(1, len(stored)), CODES_AT_A_TIME):
            part = stored[start : start + CODES_AT_A_TIME]
            codes = np.empty((len(part), self.num_columns), self.dtype)
            yield start, codes
            part[:] = self.encode(codes)


class Nibbles:
    """`[n, c]` codes of which two are in a byte: rows, or rows of one column, are decoded when they are asked for."""

    def __init__(self, stored: npt.NDArray[np.unsignedinteger], form: PointerFormat) -> None:
        self._stored, self._form = stored, form
        self.shape, self.dtype = (len(stored), form.num_columns), form.dtype

    def __getitem__(self, key: Any) -> npt.NDArray[np.unsignedinteger]:
        """Of `[rows]`, or `[rows, column]`; rows are a slice or an array."""
        if not isinstance(key, tuple):
            return self._form.decode(self._stored[key])
        rows, column = key
        found: npt.NDArray[np.unsignedinteger] = self._stored[rows, column // 2] >> 4 * (column % 2) & 15
        return found

    def max(self) -> int:
        """The largest code; there must be some."""
        starts = range(0, len(self._stored), CODES_AT_A_TIME)
        return max(int(self[start : start + CODES_AT_A_TIME].max()) for start in starts)
