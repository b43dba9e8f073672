"""Where a run's tables go: TorchRec's planner, which is told what their optimizer can do."""

import logging
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

import torch
from torch import nn
from torchrec import EmbeddingBagConfig
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.types import ShardingPlan, ShardingType
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from torchrec_cce.files.atomic import write_json
from torchrec_cce.methods.computed import ComputedEmbeddingBagConfig
from torchrec_cce.methods.registry import Method
from torchrec_cce.modules.collection import CCECollection
from torchrec_cce.modules.embedding_bag import CCEEmbeddingBagCollection
from torchrec_cce.modules.state_names import COMPUTED
from torchrec_cce.sharding.estimates import PlanSummary
from torchrec_cce.sharding.planner import CCEShardingPlanner
from torchrec_cce.sharding.replicas import PACKED, ShardedBags
from torchrec_cce.sharding.sharders import get_cce_sharders
from torchrec_cce.training.config import RunConfig
from torchrec_cce.training.input import num_dense
from torchrec_cce.training.model import build_model
from torchrec_cce.training.parallel import table_optimizer

PLAN = "plan.json"
_META = torch.device("meta")
_log = logging.getLogger(__name__)


def plan_run(config: RunConfig, world_size: int) -> ShardingPlan:
    """A plan of a run's model for the ranks of the process group. All ranks call this and get the same plan.

    It depends on nothing but the configuration, the number of ranks and hosts, and the memory of rank 0's machine.

    Raises:
        ConfigError: on every rank, if the tables do not fit.
    """
    model = build_model(config, num_dense=num_dense(config), device=_META)
    batch_size = -(-config.training.batch_size // world_size)
    return _planner(model, config, config.table_configs(), batch_size, {}).collective_plan(model)


def summary_of(
    config: RunConfig, method: Method, topology: Topology, batch_size: int, lengths: Mapping[str, float]
) -> PlanSummary:
    """The plan of a run's tables if they were compressed by `method` and trained on the ranks of `topology`.

    Args:
        batch_size: rows of a rank's batch.
        lengths: feature → raw IDs in a bag, on average; 1 for features that are not named.

    Raises:
        ConfigError: the tables do not fit.
    """
    tables = config.table_configs(method)
    collection = CCEEmbeddingBagCollection(tables, device=_META)
    planner = _planner(collection, config, tables, batch_size, lengths, topology)
    planner.plan(collection, get_cce_sharders())
    return planner.summary


def record_plan(plan: ShardingPlan, model: nn.Module, run_dir: Path) -> None:
    """Write to `plan.json` and to the log where each table is: table → sharding type, kernel, ranks.

    Args:
        model: as it was sharded by the plan.
    """
    tables = {
        name: {
            "sharding_type": placement.sharding_type,
            "compute_kernel": PACKED if name in _replicas(model.get_submodule(path)) else placement.compute_kernel,
            "ranks": sorted(set(placement.ranks or ())),
        }
        for path, placements in plan.plan.items()
        for name, placement in placements.items()
    }
    write_json(run_dir / PLAN, tables, indent=2)
    for name, table in tables.items():
        _log.info("table %s: %s, kernel %s, on ranks %s", name, *table.values())


def _replicas(stock: nn.Module) -> Set[str]:
    return stock.replicas if isinstance(stock, ShardedBags) else frozenset()


def _planner(
    model: nn.Module,
    config: RunConfig,
    tables: Sequence[EmbeddingBagConfig],
    batch_size: int,
    lengths: Mapping[str, float],
    topology: Topology | None = None,
) -> CCEShardingPlanner:
    """A planner for `model`, which is on the meta device and can only be planned with afterwards."""
    optimizer = table_optimizer(config.optimizer)
    for collection in model.modules():
        if isinstance(collection, CCECollection):
            # The planner reads the optimizer, whose state takes memory, off the parameters.
            looked_up = [p for name, p in collection.named_parameters() if not name.startswith(COMPUTED)]
            apply_optimizer_in_backward(optimizer.kind, looked_up, dict(optimizer.arguments))
    return CCEShardingPlanner(
        topology=topology,
        batch_size=batch_size,
        constraints={
            table.name: ParameterConstraints(
                pooling_factors=[lengths.get(feature, 1.0) for feature in table.feature_names],
                sharding_types=None if optimizer.can_be_fused else [ShardingType.DATA_PARALLEL.value],
            )
            for table in tables
            if not isinstance(table, ComputedEmbeddingBagConfig)  # always replicated
        },
        replicate_on_one_rank=True,  # `parallel.shard` trains replicas as it trains others
    )
