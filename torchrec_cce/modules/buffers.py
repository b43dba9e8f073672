"""`Buffers`: memory for large tensors that is used again once nobody has them any more.

glibc maps blocks above 32 MB afresh each time they are asked for, and the kernel zeroes every page: a training step that
makes three of them takes 1.4 to 1.8 times as long.
"""

from collections.abc import Sequence
from math import prod
from threading import Lock

import torch

_LARGE = 1 << 25
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
        if size <= _LARGE:
            return torch.empty(tuple(shape), dtype=dtype)
        with self._lock:
            free = [storage for storage in self._storages if _is_free(storage)]
            fitting = [storage for storage in free if size <= storage.nbytes() <= _ROOMY * size]
            if fitting:
                storage = min(fitting, key=lambda fit: fit.nbytes())
            else:  # sizes have changed: those that wait for no one go
                storage = torch.UntypedStorage(size)
                self._storages = [kept for kept in self._storages if not _is_free(kept)] + [storage]
            # Within the lock: from here on it is not free.
            return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape))  # type: ignore[call-overload, no-any-return]

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The same, of zeros."""
        return self.empty(shape, dtype).zero_() if prod(shape) * dtype.itemsize > _LARGE else torch.zeros(shape)


def _is_free(storage: torch.UntypedStorage) -> bool:
    return int(torch._C._storage_Use_Count(storage._cdata)) == _NOBODY
