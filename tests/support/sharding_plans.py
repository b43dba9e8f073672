"""Plans that a test wants, where the planner would choose another."""

from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, data_parallel, row_wise, table_wise
from torchrec.distributed.types import ShardingPlan

from torchrec_cce.sharding.sharders import CCEEmbeddingBagCollectionSharder, has_fused_kernel
from torchrec_cce.training.config import OptimizerConfig
from torchrec_cce.training.parallel import table_optimizer


def split_by_rows(model: nn.Module, optimizer: OptimizerConfig, *, world_size: int) -> ShardingPlan:
    """All tables that can be are split by rows, on one rank placed on it; the others are replicated."""
    # Before an optimizer is fused into them, TorchRec would take tables for those of a dense kernel.
    fused = EmbeddingComputeKernel.FUSED.value
    spread = row_wise(compute_kernel=fused) if world_size > 1 else table_wise(rank=0, compute_kernel=fused)
    return ShardingPlan(
        plan={
            path: construct_module_sharding_plan(
                module,
                {
                    table.name: spread
                    if table_optimizer(optimizer).can_be_fused and has_fused_kernel(table.embedding_dim)
                    else data_parallel()
                    for table in module.embedding_bag_configs()
                },
                sharder=CCEEmbeddingBagCollectionSharder(),
                local_size=world_size,
                world_size=world_size,
                device_type="cpu",
            )
            for path, module in model.named_modules()
            if isinstance(module, EmbeddingBagCollection)
        }
    )
