"""Sharded models: plans that the planner would not choose, and tables put together from the shards of all ranks."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, data_parallel, row_wise, table_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from torchrec_cce import (
    CCEEmbeddingBagCollection,
    CCEEmbeddingBagConfig,
    CCEEmbeddingCollection,
    CCEEmbeddingConfig,
    PointerMap,
)
from torchrec_cce.sharding.sharders import (
    CCEEmbeddingBagCollectionSharder,
    CCEEmbeddingCollectionSharder,
    has_fused_kernel,
)
from torchrec_cce.sharding.tables import collections_of
from torchrec_cce.training.config import OptimizerConfig
from torchrec_cce.training.parallel import table_optimizer

Array = npt.NDArray[np.float32]
TABLES = ("C1", "C2")
SIZES = {"embedding_dim": 16, "num_rows": 30}


def split_by_rows(model: nn.Module, optimizer: OptimizerConfig, *, world_size: int) -> ShardingPlan:
    """Split all tables by rows that can be, or place them if there is one rank; replicate the others."""
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


class Both(nn.Module):
    """A pooled and an unpooled collection, with wide and narrow columns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bags = CCEEmbeddingBagCollection(
            tables=[
                CCEEmbeddingBagConfig(name="user", num_embeddings=900, **SIZES),
                CCEEmbeddingBagConfig(name="item", num_embeddings=700, num_columns=8, **SIZES),
            ]
        )
        self.sequences = CCEEmbeddingCollection(
            tables=[
                CCEEmbeddingConfig(name="word", num_embeddings=800, **SIZES),
                CCEEmbeddingConfig(name="token", num_embeddings=500, num_columns=8, **SIZES),
            ]
        )


def sharded(model: Both) -> tuple[DistributedModelParallel, Any]:
    """The model with wide columns split by rows and fused with SGD, and narrow columns replicated."""
    sharders = [CCEEmbeddingBagCollectionSharder(), CCEEmbeddingCollectionSharder()]
    inner = {"bags.ebc": (model.bags.ebc, sharders[0])}
    inner |= {f"sequences.ecs.{width}": (each, sharders[1]) for width, each in model.sequences.ecs.items()}
    plans, fused = {}, []
    for path, (module, sharder) in inner.items():
        configs = module.embedding_bag_configs() if "bags" in path else module.embedding_configs()
        wide = {table.name: table.embedding_dim % 4 == 0 for table in configs}
        named = dict(module.named_parameters())
        fused += [p for name, p in named.items() if wide[name.split(".")[-2]]]
        plans[path] = construct_module_sharding_plan(
            module,
            {name: row_wise() if each else data_parallel() for name, each in wide.items()},
            sharder=sharder,
            local_size=dist.get_world_size(),
            world_size=dist.get_world_size(),
            device_type="cpu",
        )
    apply_optimizer_in_backward(torch.optim.SGD, fused, {"lr": 0.1})
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    parallel = DistributedModelParallel(
        model, device=torch.device("cpu"), plan=ShardingPlan(plan=plans), sharders=sharders
    )
    parallel.load_state_dict(weights)
    return parallel, parallel.fused_optimizer


class Table(NamedTuple):
    """A physical table as one rank sees it, put together from the shards of all."""

    weights: Array
    states: dict[str, Array]
    pointer_map: PointerMap


def whole(value: Any) -> Array:
    """A sharded or replicated tensor."""
    if not hasattr(value, "local_shards"):
        return value.detach().numpy().copy()
    mine = [(s.metadata.shard_offsets[0], s.tensor.detach().numpy().copy()) for s in value.local_shards()]
    parts: list[list[tuple[int, Array]]] = [[]] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return np.concatenate([part for _, part in sorted((p for each in parts for p in each), key=lambda pair: pair[0])])


def tables_of(model: Any, optimizer: Any) -> dict[str, Table]:
    ((path, collection),) = collections_of(model).items()
    weights, states = model.state_dict(), optimizer.state_dict()["state"]
    tables = {}
    for name in TABLES:
        key = f"{path}.ebc.embedding_bags.{name}.weight"
        names: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(names, sorted(states.get(key, {})))
        merged = {n: whole(states[key][n]) for n in names[0] if hasattr(states[key][n], "size")}
        rowwise = {n: state for n, state in merged.items() if state.ndim}
        tables[name] = Table(whole(weights[key]), rowwise, collection.pointer_map(name))
    return tables


def assert_same_bits(first: Table, second: Table) -> None:
    assert first.weights.tobytes() == second.weights.tobytes()
    assert first.states.keys() == second.states.keys()
    for name, state in first.states.items():
        assert state.tobytes() == second.states[name].tobytes(), name
    assert first.pointer_map.digest == second.pointer_map.digest
    assert first.pointer_map.generation == second.pointer_map.generation
