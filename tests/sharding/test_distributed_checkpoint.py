"""A distributed checkpoint under other maps is refused before a weight is overwritten."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from tests.support.module_cases import cce
from torchrec_cce import CCEEmbeddingBagCollection
from torchrec_cce.errors import MapMismatchError
from torchrec_cce.sharding.distributed_checkpoint import load_checkpoint
from torchrec_cce.sharding.planner import CCEShardingPlanner
from torchrec_cce.sharding.recluster import recluster_sharded
from torchrec_cce.sharding.sharders import get_cce_sharders
from torchrec_cce.sharding.tables import ShardedMaps
from torchrec_cce.training.parallel import process_group


def sharded(device: torch.device, seed: int) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    torch.manual_seed(seed)
    model = nn.ModuleDict({"sparse": CCEEmbeddingBagCollection([cce()])})
    plan = CCEShardingPlanner(batch_size=8).collective_plan(model)
    placed = DistributedModelParallel(model, device=device, plan=plan, sharders=get_cce_sharders())
    return placed, CombinedOptimizer([placed.fused_optimizer])


def test_weights_of_another_map_are_refused_before_they_are_read(tmp_path: Path) -> None:
    with process_group() as ranks:
        trained, optimizer = sharded(ranks.device, 0)
        recluster_sharded(trained, optimizer, seed=1)
        dcp.save({"model": trained.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=tmp_path)
        other, its_optimizer = sharded(ranks.device, 1)
        before = ShardedMaps(other).snapshot()
        with pytest.raises(MapMismatchError, match="table 't_user': the checkpoint was trained with the map"):
            load_checkpoint(tmp_path, other, its_optimizer)
        assert (ShardedMaps(other).snapshot()["t_user"].weights == before["t_user"].weights).all()

        dcp.load({"model": other.state_dict()}, checkpoint_id=tmp_path)  # which compares nothing
        with pytest.raises(MapMismatchError, match="'t_user': the weights, which were loaded in place"):
            ShardedMaps(other).snapshot()
        with pytest.raises(MapMismatchError, match="'t_user': the weights, which were loaded in place"):
            recluster_sharded(other, its_optimizer, seed=1)
