"""Members of bags that are chosen, by their places among the members of all bags."""

import torch


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
