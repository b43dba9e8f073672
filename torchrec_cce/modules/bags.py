"""Bags: members of those that are chosen, and features without any."""

import torch
import torch.fx
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


def members_of(lengths: torch.Tensor, bags: torch.Tensor) -> torch.Tensor:
    """The places of the members of some bags: bags of 2, 1 and 3 members, of which 2 and 0 are chosen, give 3 4 5 0 1.

    Args:
        lengths: [B] integers, of all bags.
        bags: [n] integers, possibly several times the same.

    Returns:
        [M] int64, bag after bag.
    """
    lengths = lengths.long()
    starts, sizes = (lengths.cumsum(0) - lengths)[bags], lengths[bags]
    first_of_each = sizes.cumsum(0) - sizes  # among the members that are chosen
    shifts = (starts - first_of_each).repeat_interleave(sizes)
    return torch.arange(len(shifts), device=lengths.device) + shifts


@torch.fx.wrap  # whether there are bags is no question to a symbolic batch
def splittable(features: KeyedJaggedTensor, dtype: torch.dtype | None = None) -> KeyedJaggedTensor:
    """`features` that TorchRec's `to_dict` can split by keys, also where there are no bags at all: a batch of 0.

    It can where batch sizes are given for each feature, and only there.

    Args:
        dtype: of the weights, if there are any; stock collections take those of the type of their tables alone. None =
            as they are.
    """
    weights, sizes = features.weights_or_none(), None
    if features.variable_stride_per_key():
        sizes = features.stride_per_key_per_rank()
    elif features.stride() == 0:
        sizes = [[0]] * len(features.keys())
    has_bags = sizes is None or features.variable_stride_per_key()
    if has_bags and (weights is None or dtype is None or weights.dtype == dtype):
        return features
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values(),
        lengths=features.lengths(),
        weights=None if weights is None else weights.to(dtype),
        stride=features.stride() if sizes is None else None,
        stride_per_key_per_rank=sizes,
        inverse_indices=features.inverse_indices_or_none(),
    )
