"""Which raw IDs of a table have a private row for a while, and which had one before."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from torchrec_cce.errors import ConfigError
from torchrec_cce.kernels.slots import BITS, NEVER, fill_bitmap, order_of_arrival, slots_of, slots_of_bags

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
    """The row of each position that has one: the positions in ascending order have the rows 0, 1, 2, …, or those of an
    order of their own.

    A bitmap, and the count before each of its words: 1.5 bits a position.
    """

    def __init__(self, ages: npt.NDArray[np.uint8], order: npt.NDArray[np.uint32] | None = None) -> None:
        """The positions whose age is 0, of `ages: [n]`, and their rows, see `Residency.order`."""
        num_words = -(-len(ages) // BITS)
        self._words, self._before = np.empty(num_words, np.uint64), np.empty(num_words, np.uint32)
        self.num_slots = fill_bitmap(ages, self._words, self._before)
        self._order = order
        if order is not None and len(order) != self.num_slots:
            raise ConfigError(f"the order is of {len(order)} residents, there are {self.num_slots}")
        self.num_taken = self.num_slots if order is None or not len(order) else 1 + int(order.max())
        """From this row on, nobody has any. Some below it may be those of IDs that another map did not know."""

    def rows(self, numbers: slice | Integers) -> slice | npt.NDArray[np.integer]:
        """The rows of some residents, which are numbered in the ascending order of their positions."""
        return numbers if self._order is None else self._order[numbers]

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
        if self._order is not None:
            out[out >= 0] = self._order[out[out >= 0]]
        return out

    def of_bags(self, positions: Integers, lengths: npt.NDArray[np.integer]) -> Residents:
        """The members with a row of bags of `lengths: [B]` with `positions: [N] int64`, -1 for no position."""
        slots, places, counts = np.empty_like(positions), np.empty_like(positions), np.empty_like(lengths)
        found = slots_of_bags(positions, lengths, self._words, self._before, slots, places, counts)
        if self._order is not None:
            slots[:found] = self._order[slots[:found]]
        return Residents(slots[:found], places[:found], counts)


def residency_bytes(num_ids: int, num_ordered: int = 0) -> int:
    """Bytes in host memory of an open phase: the age of each of `num_ids` positions, and their slots; and the order of
    `num_ordered` residents."""
    return num_ids + -(-num_ids // BITS) * 12 + 4 * num_ordered


@dataclass(frozen=True, kw_only=True, eq=False)
class Residency:
    """The residents of a table: the positions of its map that have a row in the present phase. Immutable.

    A phase begins when positions are admitted, and ends when their rows are folded into codewords and pointers. Others
    may arrive while it goes on.
    """

    ages: npt.NDArray[np.uint8]
    """[n] uint8, possibly memory-mapped: how many phases ago, counted from the last that began, a position had its row,
    at most 254; 255 if it never had one."""
    phases: int = 0
    """Phases that have begun."""
    is_open: bool = False
    """Whether the last of them has not ended: the positions of age 0 have rows."""
    order: npt.NDArray[np.uint32] | None = None
    """[m] uint32, possibly memory-mapped: the row of each resident, in ascending order of their positions. None where
    all came at once: 0, 1, 2, …"""

    def __post_init__(self) -> None:
        if self.ages.dtype != np.uint8 or self.ages.ndim != 1:
            raise ConfigError(f"ages are {self.ages.dtype} {list(self.ages.shape)}, not uint8 [n]")
        if self.order is not None and (self.order.dtype != np.uint32 or self.order.ndim != 1):
            raise ConfigError(f"the order is {self.order.dtype} {list(self.order.shape)}, not uint32 [m]")

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
        return Slots(self.ages, self.order)

    @property
    def nbytes(self) -> int:
        """Bytes in host memory: a byte a position, and while a phase is open 1.5 bits more, and 4 bytes a resident
        where not all came at once."""
        if not self.is_open:
            return self.num_ids
        return residency_bytes(self.num_ids, 0 if self.order is None else len(self.order))

    def next_phase(self, ages: npt.NDArray[np.uint8]) -> "Residency":
        """The phase that begins when `ages` are reached, see `admitted_ages`."""
        return Residency(ages=ages, phases=self.phases + 1, is_open=True)

    def extend_order(self, ages: npt.NDArray[np.uint8], out: npt.NDArray[np.uint32]) -> None:
        """Write the order once others arrived to `out: [m]`: who has a row keeps it, the others get the next ones.

        Args:
            ages: [n] uint8, after they arrived; as of `topped_up`.
        """
        known = np.arange(self.slots.num_slots, dtype=np.uint32) if self.order is None else self.order
        order_of_arrival(self.ages, ages, known, self.slots.num_taken, out)

    def topped_up(self, ages: npt.NDArray[np.uint8], order: npt.NDArray[np.uint32]) -> "Residency":
        """This phase, once others arrived."""
        return replace(self, ages=ages, order=order)

    def closed(self) -> "Residency":
        """After the rows were folded."""
        return replace(self, is_open=False, order=None)
