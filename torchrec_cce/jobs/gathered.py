"""A file that is written in many small parts by few calls.

Python's own buffered file copies each part while it holds the interpreter's lock, for which other threads wait.
"""

import os
from typing import Any

_ENOUGH_BYTES = 1 << 20
_MOST_PARTS = 512  # Linux takes 1024


class Gathered:
    """Writes to a file descriptor, front to back; what it was given must not change before `flush`."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._parts: list[memoryview] = []
        self._num_bytes = 0

    def write(self, data: Any) -> None:
        """Take a part, of anything that has bytes. Raises OSError, now or later."""
        part = memoryview(data).cast("B")
        self._parts.append(part)
        self._num_bytes += len(part)
        if self._num_bytes >= _ENOUGH_BYTES or len(self._parts) == _MOST_PARTS:
            self.flush()

    def flush(self) -> None:
        """Write what was taken. Raises OSError."""
        left, self._parts, self._num_bytes = self._parts, [], 0
        while left:
            written = os.writev(self._descriptor, left)
            done = 0
            while done < len(left) and written >= len(left[done]):
                written -= len(left[done])
                done += 1
            left = left[done:]
            if written:
                left[0] = left[0][written:]
