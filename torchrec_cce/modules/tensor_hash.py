"""The hash of `torchrec_cce.hashing` on tensors. The maps know it without torch."""

import numpy as np
import torch

from torchrec_cce.hashing import UniversalHash
from torchrec_cce.mixing import FACTORS, SHIFT
from torchrec_cce.modules.constant import Constant

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
