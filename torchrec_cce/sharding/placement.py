"""Where each table of a training run is placed: the plain choice that is right everywhere, without a cost model."""

from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, data_parallel, row_wise, table_wise
from torchrec.distributed.types import ShardingPlan

from torchrec_cce.sharding.sharder import CCEEmbeddingBagCollectionSharder, has_fused_kernel


def is_fused(width: int, *, in_backward: bool) -> bool:
    """Whether a table of `width` floats a row is trained by a fused kernel, which updates rows in the backward pass."""
    return in_backward and has_fused_kernel(width)


def placement_plan(
    model: nn.Module, sharder: CCEEmbeddingBagCollectionSharder, *, world_size: int, device_type: str, in_backward: bool
) -> ShardingPlan:
    """A plan for every `EmbeddingBagCollection` in `model`.

    Tables that a fused kernel can train are split by rows over the ranks (one rank holds them whole); the others,
    narrow columns or an optimizer that FBGEMM lacks, are replicated and trained data-parallel.

    Args:
        in_backward: whether the optimizer of the tables is one that FBGEMM fuses into the backward pass.
    """
    plans = {}
    for path, module in model.named_modules():
        if not isinstance(module, EmbeddingBagCollection):
            continue
        spread = row_wise() if world_size > 1 else table_wise(rank=0)
        plans[path] = construct_module_sharding_plan(
            module,
            {
                table.name: spread if is_fused(table.embedding_dim, in_backward=in_backward) else data_parallel()
                for table in module.embedding_bag_configs()
            },
            sharder=sharder,
            local_size=world_size,
            world_size=world_size,
            device_type=device_type,
        )
    return ShardingPlan(plan=plans)
