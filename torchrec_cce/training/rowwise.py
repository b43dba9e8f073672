"""Full tables quantized row by row as TorchRec serves them: numbers of few bits, a scale and a bias for each row."""

from typing import Literal, get_args

import torch

Bits = Literal[8, 4, 2]
_SCALE_AND_BIAS_BYTES = 4
"""Two float16 numbers a row."""


def row_bytes(dim: int, bits: Bits) -> int:
    """Of a row of `dim` numbers of so many `bits`, which FBGEMM packs into whole words of 2 bytes.

    Raises:
        ValueError: they do not fill such words.
    """
    if dim * bits % 16:
        step = 16 // bits
        raise ValueError(f"bits={bits} needs embeddings of a multiple of {step} floats; dim is {dim}")
    return dim * bits // 8 + _SCALE_AND_BIAS_BYTES


def rowwise_quantized(weights: torch.Tensor, bits: Bits) -> torch.Tensor:
    """What lookups read of `weights: [n, d] float32` once they are quantized by FBGEMM, as float32."""
    assert bits in get_args(Bits)
    packed = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(weights, bits)
    read: torch.Tensor = torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(packed, bits)
    return read
