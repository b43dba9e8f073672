"""What a table knows of its IDs, by their positions, when another map takes the place of its own."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from torchrec_cce.kernels.slots import NEVER
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.residency import Residency

Integers = npt.NDArray[np.int64]

_CHUNK = 1 << 16


@dataclass(frozen=True, kw_only=True, eq=False)
class Renumbering:
    """Where the raw IDs of a map were in another map, which it takes the place of."""

    old: PointerMap
    new: PointerMap

    @property
    def changes_nothing(self) -> bool:
        """Whether every raw ID has the position that it had, and none came or went."""
        return _numbering_of(self.old) == _numbering_of(self.new)

    def before(self, positions: Integers) -> Integers:
        """[N] int64: where the raw IDs at `positions: [N] int64` of the new map were; -1 for those that are new."""
        return self.old.positions(self.new.raw_ids(positions))

    def ages(self, residency: Residency, out: npt.NDArray[np.uint8]) -> None:
        """Write the ages of a residency of the old map, by positions of the new one, to `out: [n]`. IDs that are new
        never had a row."""
        for start in range(0, len(out), _CHUNK):
            positions = np.arange(start, min(start + _CHUNK, len(out)))
            before = self.before(positions)
            out[positions] = np.where(before >= 0, residency.ages[before], np.uint8(NEVER))

    def order(self, residency: Residency, ages: npt.NDArray[np.uint8], out: npt.NDArray[np.uint32]) -> None:
        """Write the slots of the residents to `out: [m]`: each keeps the one that it has; see `Residency.order`.

        Args:
            ages: [n], what `ages` gave.
        """
        done = 0
        for residents in _residents(ages):
            out[done : done + len(residents)] = residency.slots.of(self.before(residents))
            done += len(residents)


def _residents(ages: npt.NDArray[np.uint8]) -> Iterator[Integers]:
    """The positions of age 0, ascending, some at a time."""
    for start in range(0, len(ages), _CHUNK):
        yield start + np.flatnonzero(ages[start : start + _CHUNK] == 0)


def _numbering_of(pointer_map: PointerMap) -> tuple[int, str | None]:
    """What decides which position a raw ID has."""
    vocabulary = pointer_map.vocabulary
    return pointer_map.num_ids, None if vocabulary is None else vocabulary.digest
