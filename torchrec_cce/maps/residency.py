"""Which raw IDs of a table have a private row for a while, and which had one before."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from torchrec_cce.errors import ConfigError
from torchrec_cce.kernels.slots import BITS, NEVER, fill_bitmap, slots_of, slots_of_bags

Integers = npt.NDArray[np.int64]


class Residents(NamedTuple):
    """The members of some bags that have a row."""

    slots: Integers
    """[R] int64: the row of each, bag after bag."""
    places: Integers
    """[R] int64: its index among all members."""
    lengths: npt.NDArray[np.integer]
    """[B], of the integer type of the bags' lengths: how many each bag has."""

    def places_in_bags(self, lengths: npt.NDArray[np.integer]) -> Integers:
        """[R] int64: the index of each among the members of its bag, of bags of `lengths: [B]`."""
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        return self.places - starts.repeat(self.lengths)


class Slots:
    """The row of each position that has one: the positions in ascending order have the rows 0, 1, 2, …

    A bitmap, and the count before each of its words: 1.5 bits a position.
    """

    def __init__(self, ages: npt.NDArray[np.uint8]) -> None:
        """The positions whose age is 0, of `ages: [n]`."""
        num_words = -(-len(ages) // BITS)
        self._words, self._before = np.empty(num_words, np.uint64), np.empty(num_words, np.uint32)
        self.num_slots = fill_bitmap(ages, self._words, self._before)

    def before(self, position: int) -> int:
        """How many positions below `position` have a row."""
        at, bit = divmod(position, BITS)
        if at == len(self._words):
            return self.num_slots
        return int(self._before[at]) + (int(self._words[at]) & ((1 << bit) - 1)).bit_count()

    def of(self, positions: Integers) -> Integers:
        """[N] int64: the rows of `positions: [N] int64`, -1 for a position that has none."""
        out = np.empty(len(positions), np.int64)
        slots_of(positions, self._words, self._before, out)
        return out

    def of_bags(self, positions: Integers, lengths: npt.NDArray[np.integer]) -> Residents:
        """The members with a row of bags of `lengths: [B]` with `positions: [N] int64`, -1 for no position."""
        slots, places, counts = np.empty_like(positions), np.empty_like(positions), np.empty_like(lengths)
        found = slots_of_bags(positions, lengths, self._words, self._before, slots, places, counts)
        return Residents(slots[:found], places[:found], counts)


def residency_bytes(num_ids: int) -> int:
    """Bytes in host memory of an open phase: the age of each of `num_ids` positions, and their slots."""
    return num_ids + -(-num_ids // BITS) * 12


@dataclass(frozen=True, kw_only=True, eq=False)
class Residency:
    """The residents of a table: the positions of its map that have a row in the present phase. Immutable.

    A phase begins when positions are admitted, and ends when their rows are folded into codewords and pointers.
    """

    ages: npt.NDArray[np.uint8]
    """[n] uint8, possibly memory-mapped: how many phases ago, counted from the last that began, a position had its row,
    at most 254; 255 if it never had one."""
    phases: int = 0
    """Phases that have begun."""
    is_open: bool = False
    """Whether the last of them has not ended: the positions of age 0 have rows."""

    def __post_init__(self) -> None:
        if self.ages.dtype != np.uint8 or self.ages.ndim != 1:
            raise ConfigError(f"ages are {self.ages.dtype} {list(self.ages.shape)}, not uint8 [n]")

    @classmethod
    def nobody(cls, num_ids: int) -> "Residency":
        """Before the first phase. Takes no memory."""
        return cls(ages=np.broadcast_to(np.uint8(NEVER), num_ids))

    @property
    def num_ids(self) -> int:
        return len(self.ages)

    @cached_property
    def slots(self) -> Slots:
        """The rows of the positions of age 0."""
        return Slots(self.ages)

    @property
    def nbytes(self) -> int:
        """Bytes in host memory: a byte a position, and while a phase is open 1.5 bits more."""
        return residency_bytes(self.num_ids) if self.is_open else self.num_ids

    def next_phase(self, ages: npt.NDArray[np.uint8]) -> "Residency":
        """The phase that begins when `ages` are reached, see `admitted_ages`."""
        return Residency(ages=ages, phases=self.phases + 1, is_open=True)

    def closed(self) -> "Residency":
        """After the rows were folded."""
        return replace(self, is_open=False)
