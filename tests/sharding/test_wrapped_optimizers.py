"""Optimizers that TorchRec's wrap and combine: their state goes along as that of plain ones."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import ParameterConstraints
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.optim.warmup import WarmupOptimizer, WarmupStage

from tests.support.module_cases import cce, random_features
from torchrec_cce import CCEEmbeddingBagCollection
from torchrec_cce.sharding import CCEShardingPlanner, get_cce_sharders, load_checkpoint, recluster_sharded
from torchrec_cce.training.parallel import process_group

IDS = random_features({"user": 1000}, 20, 3, seed=0)
Combine = Callable[[KeyedOptimizer, KeyedOptimizer], KeyedOptimizer]


def plain(fused: KeyedOptimizer, dense: KeyedOptimizer) -> KeyedOptimizer:
    return CombinedOptimizer([fused, dense])


def clipped(optimizer: KeyedOptimizer) -> GradientClippingOptimizer:
    return GradientClippingOptimizer(optimizer, clipping=GradientClipping.NORM, max_gradient=100.0)


WRAPPED: dict[str, Combine] = {
    "keyed": lambda fused, dense: CombinedOptimizer([("tables", fused), ("dense", dense)]),
    "wrapped parts": lambda fused, dense: CombinedOptimizer([fused, clipped(dense)]),
    "wrapped whole": lambda fused, dense: clipped(CombinedOptimizer([("tables", fused), ("dense", dense)])),
    "warm-up": lambda fused, dense: CombinedOptimizer(
        [fused, WarmupOptimizer(clipped(dense), [WarmupStage()], lr=0.1)]
    ),
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sparse, self.dense = CCEEmbeddingBagCollection([cce()]), nn.Linear(16, 1)

    def forward(self) -> torch.Tensor:
        loss: torch.Tensor = self.dense(self.sparse(IDS).values()).square().sum()
        return loss


def sharded(placement: str, combine: Combine, device: torch.device) -> tuple[DistributedModelParallel, KeyedOptimizer]:
    model = Model()
    if placement != "data_parallel":
        apply_optimizer_in_backward(RowWiseAdagrad, model.sparse.parameters(), {"lr": 0.1})
    constraints = {"t_user": ParameterConstraints(sharding_types=[placement])}
    plan = CCEShardingPlanner(batch_size=20, constraints=constraints).collective_plan(model, get_cce_sharders())
    placed = DistributedModelParallel(model, device=device, plan=plan, sharders=get_cce_sharders())
    rest = dict(in_backward_optimizer_filter(placed.named_parameters()))
    dense = KeyedOptimizerWrapper(rest, lambda parameters: torch.optim.Adam(parameters, lr=0.1))
    return placed, combine(placed.fused_optimizer, dense)


def train(model: nn.Module, optimizer: KeyedOptimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("placement", ["table_wise", "data_parallel"])
@pytest.mark.parametrize("combine", WRAPPED.values(), ids=WRAPPED)
def test_clustered_and_loaded_as_by_plain_ones(placement: str, combine: Combine, tmp_path: Path) -> None:
    with process_group() as ranks:
        found = []
        for each in (plain, combine):
            model, optimizer = sharded(placement, each, ranks.device)
            train(model, optimizer, 3)
            recluster_sharded(model, optimizer, seed=1)
            found.append(train(model, optimizer, 3))
        assert found[0] == found[1]

        dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=tmp_path)
        resumed, its_optimizer = sharded(placement, combine, ranks.device)
        resumed.module.sparse.attach_pointer_map("t_user", model.module.sparse.pointer_map("t_user"))
        load_checkpoint(tmp_path, resumed, its_optimizer)
        assert train(resumed, its_optimizer, 3) == train(model, optimizer, 3)
