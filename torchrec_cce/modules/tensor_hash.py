"""The hash of `torchrec_cce.hashing` on tensors. The maps know it without torch."""

import numpy as np
import torch

from torchrec_cce.hashing import UniversalHash
from torchrec_cce.mixing import FACTORS, SHIFT

_MASK_31, _MASK_32 = 2 ** (64 - SHIFT) - 1, 2**32 - 1
_FACTORS: list[int] = np.array(FACTORS, np.uint64).view(np.int64).tolist()


def hash_tensor(functions: UniversalHash, ids: torch.Tensor) -> torch.Tensor:
    """Hash `ids: [N] int64` (any value, any device) to rows `[N, c] int64`, with the bits of `functions.numpy`.

    torch has no uint64 arithmetic, but int64 wraps to the same bits, and the masks undo the sign extension of `>>`.
    """
    multipliers = torch.from_numpy(functions.multipliers.view(np.int64)).to(ids.device)
    offsets = torch.from_numpy(functions.offsets.view(np.int64)).to(ids.device)
    x = ids.to(torch.int64)
    for factor in _FACTORS:
        x = (x ^ ((x >> SHIFT) & _MASK_31)) * factor
    x = x ^ ((x >> SHIFT) & _MASK_31)
    spread = ((x[:, None] * multipliers + offsets) >> 32) & _MASK_32
    rows: torch.Tensor = ((spread * functions.num_rows) >> 32) & _MASK_32
    return rows
