"""`Buffers`: memory for large tensors that is used again once nobody has them any more.

glibc gives large blocks back to the system when they are free, those above 32 MB always, and asks for them afresh: the
kernel then zeroes every page. A training step that makes three of 50 MB takes 1.4 to 1.8 times as long.
"""

from collections.abc import Sequence
from math import prod
from threading import Lock

import torch

_LARGE = 1 << 20
_NOBODY = 1
"""The count of a storage that `Buffers` alone has."""
_ROOMY = 2
"""A buffer may be so many times larger than what is asked for."""


class Buffers:
    """Each tensor is given out once at a time: a view or a NumPy array of it counts as one who has it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._storages: list[torch.UntypedStorage] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor on the CPU, not initialised."""
        size = prod(shape) * dtype.itemsize
        if size < _LARGE:
            return torch.empty(tuple(shape), dtype=dtype)
        with self._lock:
            free = sorted(filter(_is_free, self._storages), key=torch.UntypedStorage.nbytes)
            fitting = [storage for storage in free if size <= storage.nbytes() <= _ROOMY * size]
            if fitting:
                storage = fitting[0]
            else:
                storage = torch.UntypedStorage(size)
                # One makes room: there are never more than were in use at once.
                unfit = free[-1] if free else None
                self._storages = [kept for kept in self._storages if kept is not unfit] + [storage]
            # Within the lock: from here on it is not free.
            return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape))  # type: ignore[call-overload, no-any-return]


def _is_free(storage: torch.UntypedStorage) -> bool:
    return int(torch._C._storage_Use_Count(storage._cdata)) == _NOBODY
