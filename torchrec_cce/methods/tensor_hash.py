"""`TensorHash`: the hash functions of `hashing`, for tensors; and `Constant`, tensors that every device has."""

import numpy as np
import torch
from torch.fx import Proxy

from torchrec_cce.hashing import FACTORS, SHIFT, UniversalHash


class Constant:
    """`values`, copied once to each device that asks.

    No buffer, for those lose their values when a module is built on the meta device and materialised later.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self._copies = {values.device: values}

    def on(self, device: torch.device) -> torch.Tensor:
        """The values on `device`; in a symbolic trace, which knows of no device, where they were first."""
        (first, *_) = self._copies.values()
        if isinstance(device, Proxy):
            return first
        if device in self._copies:
            return self._copies[device]
        copied = first.to(device)
        if not torch.compiler.is_compiling():  # else it is a stand-in for a tensor
            self._copies[device] = copied
        return copied


_MASK_31, _MASK_32 = 2 ** (64 - SHIFT) - 1, 2**32 - 1
_FACTORS: list[int] = np.array(FACTORS, np.uint64).view(np.int64).tolist()


class TensorHash:
    """`functions` for tensors of any device."""

    def __init__(self, functions: UniversalHash) -> None:
        self._num_rows = functions.num_rows
        self._multipliers, self._offsets = (
            Constant(torch.from_numpy(words.view(np.int64))) for words in (functions.multipliers, functions.offsets)
        )

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Hash `ids: [N] int64` (any value) to rows `[N, c] int64`, with the bits of `UniversalHash.numpy`.

        torch has no uint64 arithmetic, but int64 wraps to the same bits, and the masks undo the sign extension of `>>`.
        """
        x = ids.to(torch.int64)
        for factor in _FACTORS:
            x = (x ^ ((x >> SHIFT) & _MASK_31)) * factor
        x = x ^ ((x >> SHIFT) & _MASK_31)
        spread = ((x[:, None] * self._multipliers.on(x.device) + self._offsets.on(x.device)) >> 32) & _MASK_32
        rows: torch.Tensor = ((spread * self._num_rows) >> 32) & _MASK_32
        return rows
