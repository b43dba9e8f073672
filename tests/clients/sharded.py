"""The model in shards, as TorchRec's recipes have it: fused optimizers in the backward pass, and one for the rest."""

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import ParameterConstraints
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from tests.clients.clicks import BATCH_SIZE, TABLES, dlrm
from torchrec_cce import CCEEmbeddingBagCollection, tables_under_cap
from torchrec_cce.sharding import CCEShardingPlanner, get_cce_sharders


def build() -> tuple[DistributedModelParallel, CombinedOptimizer]:
    torch.manual_seed(0)
    model = dlrm(CCEEmbeddingBagCollection(tables=tables_under_cap(TABLES, method="cce", max_parameters=1_000)))
    apply_optimizer_in_backward(torch.optim.Adagrad, model.model.sparse_arch.parameters(), {"lr": 0.1})
    constraints = {"t_user": ParameterConstraints(sharding_types=["table_wise"])}  # t_item is replicated
    planner, sharders = CCEShardingPlanner(batch_size=BATCH_SIZE, constraints=constraints), get_cce_sharders()
    plan = planner.collective_plan(model, sharders)
    sharded = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    dense = dict(in_backward_optimizer_filter(sharded.named_parameters()))
    adagrad = KeyedOptimizerWrapper(dense, lambda parameters: torch.optim.Adagrad(parameters, lr=0.1))
    return sharded, CombinedOptimizer([sharded.fused_optimizer, adagrad])
