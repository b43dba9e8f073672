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

from tests.support.launch import on_ranks
from tests.support.sharded_models import Both, sharded
from torchrec_cce import (
    Registry,
)
from torchrec_cce.errors import MapMismatchError
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.sharding.recluster import recluster_sharded
from torchrec_cce.sharding.tables import ShardedMaps, collections_of
from torchrec_cce.training.parallel import process_group


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
