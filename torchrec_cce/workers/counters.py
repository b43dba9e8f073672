"""Numbers that tasks set while they work, for those who watch."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

TICK_S = 0.5
"""How often somebody looks: more often is more than people see."""
COUNTER = np.dtype(np.int64)


class Counters(Protocol):
    """So many numbers, zero at first. Picklable; the engine that made them keeps them."""

    def set(self, start: int, *values: int) -> None:
        """Of a task: the numbers from `start` on, which no other task sets. It may be called often."""
        ...

    def read(self) -> list[int]:
        """All numbers as they were some moments ago, those of one `set` together."""
        ...


@dataclass(frozen=True, kw_only=True)
class FileCounters:
    """Numbers in a file that a process of this machine holds open."""

    path: str
    count: int

    def set(self, start: int, *values: int) -> None:
        """In one write, so that nobody reads one without the others."""
        with open(self.path, "r+b", buffering=0) as file:
            file.seek(start * COUNTER.itemsize)
            file.write(np.array(values, COUNTER).tobytes())

    def read(self) -> list[int]:
        numbers: list[int] = np.fromfile(self.path, COUNTER, self.count).tolist()
        return numbers
