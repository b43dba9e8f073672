"""Versions are published from and attached to sharded models, pooled and unpooled, on all ranks together."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, data_parallel, row_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from tests.support.launch import on_ranks
from torchrec_cce import (
    CCEEmbeddingBagCollection,
    CCEEmbeddingBagConfig,
    CCEEmbeddingCollection,
    CCEEmbeddingConfig,
    Registry,
)
from torchrec_cce.errors import MapMismatchError
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.sharding.recluster import recluster_sharded
from torchrec_cce.sharding.sharders import CCEEmbeddingBagCollectionSharder, CCEEmbeddingCollectionSharder
from torchrec_cce.sharding.tables import ShardedMaps, collections_of
from torchrec_cce.training.parallel import process_group

SIZES = {"embedding_dim": 16, "num_rows": 30}


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
    """Wide columns by rows and fused with SGD, narrow ones replicated."""
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


def batch() -> KeyedJaggedTensor:
    rng = np.random.default_rng(0)
    sizes = {"user": 900, "item": 700, "word": 800, "token": 500}
    values = torch.from_numpy(np.concatenate([rng.integers(0, n, 8) for n in sizes.values()]))
    return KeyedJaggedTensor.from_lengths_sync(keys=list(sizes), values=values, lengths=torch.full((16,), 2))


def outputs(model: nn.Module) -> list[torch.Tensor]:
    found: Any = model
    sequences = found.sequences(batch())
    return [found.bags(batch()).values().detach(), *(sequences[name].values().detach() for name in ("word", "token"))]


def publish_and_attach(folder: Path) -> tuple[dict[str, TableSnapshot], list[str], bool, str]:
    """Recluster and publish; overwrite the words; go back to what was published."""
    with process_group() as ranks:
        model, optimizer = sharded(Both())
        reports = recluster_sharded(model, optimizer, seed=3)
        tables = ShardedMaps(model).snapshot(reports)
        before = outputs(model.module)
        registry = Registry(folder / "registry", cache=folder / "cache")
        if ranks.is_first:
            registry.publish(tables)
        dist.barrier()
        doubled = {name: replace(table, weights=2 * table.weights) for name, table in tables.items()}  # type: ignore[operator]
        ShardedMaps(model).restore(doubled)
        changed = outputs(model.module)
        opened = registry.open()
        opened.attach(ShardedMaps(model))
        after = outputs(model.module)
        same = all(map(torch.equal, before, after)) and not any(map(torch.equal, before, changed))

        message = ""
        wrong = dict(opened.tables)
        if ranks.rank == ranks.world_size - 1:  # this rank alone sees a map of another size
            wrong["token"] = wrong["item"]
        try:
            ShardedMaps(model).restore(wrong)
        except MapMismatchError as error:
            message = str(error)
        same = same and all(map(torch.equal, outputs(model.module), after))
        versions = [
            collection.pointer_map(name).identity
            for collection in collections_of(model).values()
            for name in collection.cce_tables()
        ]
        return tables, versions, same, message


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_sharded_model_publishes_and_attaches(tmp_path: Path, world_size: int) -> None:
    finished = on_ranks(tmp_path / "ranks", world_size, publish_and_attach, tmp_path)
    for rank in finished:
        assert rank.code == 0, rank.stderr
    alone = Both()
    reports = {**alone.bags.recluster(seed=3), **alone.sequences.recluster(seed=3)}
    expected = {**alone.bags.snapshot(reports), **alone.sequences.snapshot(reports)}
    for rank in finished:
        tables, versions, same, message = rank.value
        assert same, "what is attached computes what was published"
        assert message.startswith("table 'token' has 500 IDs"), "raised on every rank"
        assert [text.split(",")[0] for text in versions] == ["version 1"] * 4
        assert tables.keys() == expected.keys()
        for name, table in tables.items():
            np.testing.assert_array_equal(table.weights, expected[name].weights)
            assert table.pointer_map.digest == expected[name].pointer_map.digest
            assert (table.entropies, table.objective) == (expected[name].entropies, expected[name].objective)
