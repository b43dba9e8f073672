"""The hash of `torchrec_cce.hashing` on tensors. The maps know it without torch."""

import numpy as np
import torch

from torchrec_cce.hashing import MIX, UniversalHash

_MASK_32 = 0xFFFFFFFF


def hash_tensor(functions: UniversalHash, ids: torch.Tensor) -> torch.Tensor:
    """Hash `ids: [N] int64` (any value, any device) to rows `[N, c] int64`, with the bits of `functions.numpy`.

    torch has no uint64 arithmetic, but int64 wraps to the same bits, and the masks undo the sign extension of `>>`.
    """
    multipliers = torch.from_numpy(functions.multipliers.view(np.int64)).to(ids.device)
    offsets = torch.from_numpy(functions.offsets.view(np.int64)).to(ids.device)
    x = ids.to(torch.int64)
    for shift, factor in MIX:
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * _signed(factor)
    spread = ((x[:, None] * multipliers + offsets) >> 32) & _MASK_32
    return ((spread * functions.num_rows) >> 32) & _MASK_32


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word
