"""Where each table of a training run is placed: the plain choice that is right everywhere, without a cost model."""

from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, data_parallel, row_wise, table_wise
from torchrec.distributed.types import ShardingPlan, ShardingType

_FUSED_WIDTH = 4
"""FBGEMM's fused kernels read rows of a multiple of 4 floats."""


class CPUEmbeddingBagCollectionSharder(EmbeddingBagCollectionSharder):
    """The stock sharder, which on a CPU does not list row-wise sharding although gloo carries it out."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        types: list[str] = super().sharding_types(compute_device_type)
        return [*types, *({ShardingType.ROW_WISE.value} - set(types))]


def is_fused(width: int, *, in_backward: bool) -> bool:
    """Whether a table of `width` floats a row is trained by a fused kernel, which updates rows in the backward pass."""
    return in_backward and width % _FUSED_WIDTH == 0


def placement_plan(
    model: nn.Module, sharder: CPUEmbeddingBagCollectionSharder, *, world_size: int, device_type: str, in_backward: bool
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
