"""Host memory for maps: once a host, whatever the number of its ranks."""

import numpy as np
import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagConfig
from torchrec.distributed.planner.types import PlannerError

from torchrec_cce import (
    CCEEmbeddingBagCollection,
    CCEEmbeddingBagConfig,
    CCEEmbeddingCollection,
    CCEEmbeddingConfig,
    CompositionalEmbeddingBagConfig,
    ResidentConfig,
)
from torchrec_cce.maps.vocabulary import Vocabulary
from torchrec_cce.sharding.estimates import MapStorageReservation, map_bytes
from torchrec_cce.sharding.planner import CCEShardingPlanner, planning_topology
from torchrec_cce.sharding.sharders import get_cce_sharders

META = torch.device("meta")


def model(n: int = 1000, num_rows: int = 10) -> nn.Module:
    tables = [
        CCEEmbeddingBagConfig(name="t", num_embeddings=n, embedding_dim=16, feature_names=["a"], num_rows=num_rows),
        CompositionalEmbeddingBagConfig(
            name="hashed", num_embeddings=n, embedding_dim=16, feature_names=["b"], num_rows=num_rows
        ),
        EmbeddingBagConfig(name="full", num_embeddings=n, embedding_dim=16, feature_names=["c"]),
    ]
    return nn.ModuleDict({"sparse": CCEEmbeddingBagCollection(tables, device=META)})


@pytest.mark.parametrize(("num_rows", "itemsize"), [(256, 1), (257, 2), (65537, 4)])
def test_a_map_is_its_pointers_also_before_there_are_any(num_rows: int, itemsize: int) -> None:
    assert map_bytes(model(num_rows=num_rows)) == {"sparse.ebc.t": 1000 * 4 * itemsize}


@pytest.mark.parametrize(("num_columns", "num_bytes"), [(4, 2), (1, 1), (16, 8)])
def test_pointers_of_4_bits_are_half_of_that(num_columns: int, num_bytes: int) -> None:
    table = CCEEmbeddingBagConfig(
        name="t", num_embeddings=1000, embedding_dim=16, num_rows=16, num_columns=num_columns, min_pointer_bits=4
    )
    one = nn.ModuleDict({"sparse": CCEEmbeddingBagCollection([table], device=META)})
    assert map_bytes(one) == {"sparse.ebc.t": 1000 * num_bytes}


@pytest.mark.parametrize("in_sequences", [False, True])
def test_rows_of_residents_count_for_every_rank_where_they_are_replicated_on_the_host(in_sequences: bool) -> None:
    def bytes_of(dtype: str, local_world_size: int) -> int:
        sizes = {"num_embeddings": 1000, "embedding_dim": 16, "num_rows": 10, "feature_names": ["a"]}
        residents = ResidentConfig(fraction=0.5, dtype=dtype)
        if in_sequences:
            table = CCEEmbeddingConfig(name="t", residents=residents, **sizes)
            collection: nn.Module = CCEEmbeddingCollection([table], device=META)
        else:
            collection = CCEEmbeddingBagCollection(
                [CCEEmbeddingBagConfig(name="t", residents=residents, **sizes)], device=META
            )
        found = map_bytes(nn.ModuleDict({"sparse": collection}), local_world_size=local_world_size)
        return found["sparse.codewords.4.t" if in_sequences else "sparse.codewords.t"]

    shared = 4000 + 1000 + 16 * 12  # pointers, ages, slots
    assert bytes_of("float32", 8) == shared
    assert bytes_of("float16", 8) == shared + 8 * 500 * (2 * 16 + 4)
    assert bytes_of("int8", 1) == shared + 500 * (16 + 4)


def test_a_vocabulary_counts_as_what_it_takes() -> None:
    one = model()
    collection = one["sparse"]
    keys = Vocabulary.build(np.arange(1000, dtype=np.int64) * 7)
    collection.attach_pointer_map("t", collection.pointer_map("t").with_vocabulary(keys))
    assert map_bytes(one) == {"sparse.ebc.t": 4000 + keys.nbytes}


@pytest.mark.parametrize(("world_size", "local_world_size"), [(2, 2), (8, 8), (16, 8), (3, 3)])
def test_all_ranks_of_a_host_together_reserve_a_map_once(world_size: int, local_world_size: int) -> None:
    topology = planning_topology(
        "cuda", world_size=world_size, local_world_size=local_world_size, device_bytes=1000, host_bytes=10**6
    )
    left = MapStorageReservation(0.25).reserve(topology, 8, model(), get_cce_sharders())
    shares = [
        before.storage.ddr - after.storage.ddr for before, after in zip(topology.devices, left.devices, strict=True)
    ]
    hosts = [sum(shares[start : start + local_world_size]) for start in range(0, world_size, local_world_size)]
    for host in hosts:
        assert 4000 <= host < 4000 + local_world_size
    assert {device.storage.hbm for device in left.devices} == {750}


def test_maps_that_do_not_fit() -> None:
    topology = planning_topology("cpu", world_size=2, device_bytes=0, host_bytes=3000)
    with pytest.raises(
        PlannerError, match=r"need 4\.0 kB of each host's memory, which has 3\.0 kB; .* 'sparse\.ebc\.t'"
    ):
        MapStorageReservation(0.0).reserve(topology, 8, model(), get_cce_sharders())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_figures_of_a_plan_have_the_map_once_a_host(device: str) -> None:
    planned = {}
    for n in (10**6, 2 * 10**6):
        topology = planning_topology(device, world_size=16, local_world_size=8, device_bytes=10**10, host_bytes=10**10)
        table = CCEEmbeddingBagConfig(name="t", num_embeddings=n, embedding_dim=16, feature_names=["a"], num_rows=300)
        planner = CCEShardingPlanner(topology=topology, batch_size=8)
        planner.plan(CCEEmbeddingBagCollection([table], device=META), get_cce_sharders())
        planned[n] = planner.summary
        assert planner.summary.tables[0].host_bytes <= planner.summary.host_bytes
    small, large = planned.values()
    assert large.host_bytes - small.host_bytes == 10**6 * 4 * 2
    assert large.tables[0].host_bytes - small.tables[0].host_bytes == 10**6 * 4 * 2
    assert (large.device_bytes > 0) == (device == "cuda")
