"""Plans: what is picked, and what does not fit."""

from typing import Any

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingConfig
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.types import ShardingType

from torchrec_cce import (
    CCEEmbeddingBagCollection,
    CCEEmbeddingBagConfig,
    CCEEmbeddingCollection,
    CCEEmbeddingConfig,
    CompositionalEmbeddingBagConfig,
    DeepHashEmbeddingBagConfig,
    ResidentConfig,
)
from torchrec_cce.errors import ConfigError
from torchrec_cce.sharding.planner import CCEShardingPlanner, planning_topology
from torchrec_cce.sharding.sharders import SHARDING_TYPES, get_cce_sharders

GB = 10**9


META = torch.device("meta")


BY_COLUMNS = {"column_wise", "table_column_wise", "grid_shard"}


def gpus(world_size: int = 8, *, device_bytes: int = 80 * GB, host_bytes: int = 1000 * GB) -> Topology:
    return planning_topology(
        "cuda", world_size=world_size, local_world_size=8, device_bytes=device_bytes, host_bytes=host_bytes
    )


def cce(name: str, *, num_rows: int, dim: int = 64, num_columns: int = 4, n: int = 10**6) -> CCEEmbeddingBagConfig:
    return CCEEmbeddingBagConfig(
        name=name,
        num_embeddings=n,
        embedding_dim=dim,
        feature_names=[f"{name}_id"],
        num_rows=num_rows,
        num_columns=num_columns,
    )


def picks(tables: list[EmbeddingBagConfig], topology: Topology, **arguments: Any) -> dict[str, str]:
    """Table → sharding type."""
    planner = CCEShardingPlanner(topology=topology, **{"batch_size": 4096, **arguments})
    plan = planner.plan(nn.Sequential(CCEEmbeddingBagCollection(tables, device=META)), get_cce_sharders())
    assert list(plan.plan) == ["0.ebc"]
    return {name: one.sharding_type for name, one in plan.plan["0.ebc"].items()}


def test_a_tiny_table_is_replicated_and_a_huge_one_is_not() -> None:
    tables = [
        cce("tiny", num_rows=100),
        cce("huge", num_rows=2**25, dim=128, n=10**9),
        EmbeddingBagConfig(name="full", num_embeddings=10**8, embedding_dim=128, feature_names=["full_id"]),
    ]
    found = picks(tables, gpus(16))
    assert found["tiny"] == "data_parallel"
    assert found["huge"] != "data_parallel"
    assert found["full"] != "data_parallel"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_collective_costs_more_than_its_bytes(device: str) -> None:
    """By bytes alone, a table of 16 kB would be split: a batch of 32 rows is less."""
    topology = planning_topology(device, world_size=8, device_bytes=GB, host_bytes=GB)
    assert picks([cce("t", num_rows=31, dim=16, n=1000)], topology, batch_size=32) == {"t": "data_parallel"}


@pytest.mark.parametrize("world_size", [8, 64])
@pytest.mark.parametrize("num_rows", [10, 10**3, 10**5, 10**7])
def test_no_table_is_split_by_columns(world_size: int, num_rows: int) -> None:
    """Also not one so wide and skewed that TorchRec would."""
    tables = [cce("wide", num_rows=num_rows, dim=1024, num_columns=1), cce("narrow", num_rows=num_rows)]
    found = picks(tables, gpus(world_size))
    assert not BY_COLUMNS & set(found.values())
    for device in ("cuda", "cpu"):
        assert not BY_COLUMNS & set(get_cce_sharders()[0].sharding_types(device))


@pytest.mark.parametrize("width", [1, 2, 3])
def test_columns_without_a_fused_kernel_are_replicated(width: int) -> None:
    table = cce("t", num_rows=2**20, dim=12, num_columns=12 // width)
    planner = CCEShardingPlanner(topology=gpus(), batch_size=64)
    plan = planner.plan(CCEEmbeddingBagCollection([table], device=META), get_cce_sharders())
    assert plan.plan["ebc"]["t"].sharding_type == "data_parallel"
    assert plan.plan["ebc"]["t"].compute_kernel == "dense"


def test_what_does_not_fit_is_named() -> None:
    tables = [cce("small", num_rows=100), cce("t_item", num_rows=2**20, dim=12, num_columns=12)]
    with pytest.raises(
        ConfigError, match=r"^no plan: .* 't_item', at least 1\d\d\.\d MB .*\(data_parallel\)"
    ) as caught:
        picks(tables, gpus(device_bytes=GB // 50, host_bytes=GB))
    assert "each of 8 ranks has 17.0 MB of device memory and" in str(caught.value)


def test_maps_that_do_not_fit_are_named() -> None:
    with pytest.raises(ConfigError, match=r"maps need 8\.0 GB of each host's memory, which has 1\.0 GB.*'0\.ebc\.t'"):
        picks([cce("t", num_rows=1000, n=10**9)], gpus(host_bytes=GB))


def test_two_tables_of_one_name() -> None:
    parts = [CCEEmbeddingBagCollection([cce("t", num_rows=rows)], device=META) for rows in (10, 20)]
    planner = CCEShardingPlanner(topology=gpus(), batch_size=64)
    with pytest.raises(ConfigError, match="two different tables of the name 't'"):
        planner.plan(nn.Sequential(*parts), get_cce_sharders())


def test_tables_outside_of_a_cce_collection_are_planned_too() -> None:
    plain = EmbeddingBagConfig(name="plain", num_embeddings=10, embedding_dim=8, feature_names=["a", "b"])
    model = nn.ModuleDict(
        {
            "plain": EmbeddingBagCollection(tables=[plain], device=META),
            "cce": CCEEmbeddingBagCollection([cce("t", num_rows=10)], device=META),
        }
    )
    constraints = {"plain": ParameterConstraints(sharding_types=["row_wise"], pooling_factors=[3.0])}
    planner = CCEShardingPlanner(topology=gpus(), batch_size=64, constraints=constraints)
    plan = planner.plan(model, get_cce_sharders()).plan
    assert set(plan) == {"plain", "cce.ebc"}
    assert plan["plain"]["plain"].sharding_type == "row_wise"


def test_without_a_plan_or_a_process_group() -> None:
    with pytest.raises(ConfigError, match="no process group"):
        CCEShardingPlanner(batch_size=1)
    with pytest.raises(ConfigError, match="no plan yet"):
        _ = CCEShardingPlanner(topology=gpus(), batch_size=1).summary
    with pytest.raises(ConfigError, match=r"world_size=12 .* local_world_size=8"):
        gpus(12)


def test_what_a_step_sends() -> None:
    """By hand, for 2 hosts of 8 ranks, 10 rows a rank, one column feature of 8 floats, bags of 3 IDs, 6 rows."""
    sent = {}
    for kind in SHARDING_TYPES:
        constraints = {"t": ParameterConstraints(sharding_types=[kind], pooling_factors=[3.0])}
        planner = CCEShardingPlanner(topology=gpus(16), batch_size=10, constraints=constraints)
        table = cce("t", num_rows=50, dim=8, num_columns=1)
        planner.plan(CCEEmbeddingBagCollection([table], device=META), get_cce_sharders())
        (one,) = planner.summary.tables
        sent[kind] = (one.all_to_all_bytes, one.all_reduce_bytes)
    rows, lengths, embeddings = 10 * 6 * 8, 10 * 4, 10 * 8 * 4
    assert sent == {
        "data_parallel": (0, 2 * (2 * 50 * 8 * 4) * 15 // 16),
        "table_wise": (round((rows + lengths + 2 * embeddings) * 15 / 16), 0),
        "row_wise": (round((rows + 16 * lengths) * 15 / 16 + 2 * 15 * embeddings), 0),
        "table_row_wise": (round((rows + 8 * lengths) * 15 / 16 + 2 * (7 + 1 / 2) * embeddings), 0),
    }


def test_stock_does_not_list_rows_on_the_cpu() -> None:
    """Or the sharder of ours would not be needed."""
    assert ShardingType.ROW_WISE.value not in EmbeddingBagCollectionSharder().sharding_types("cpu")
    assert ShardingType.ROW_WISE.value in get_cce_sharders()[0].sharding_types("cpu")


def test_sequences_are_planned_like_bags() -> None:
    """Wide columns may be split, narrow ones are replicated; both kinds of collections in one model."""
    sizes = {"embedding_dim": 16, "num_rows": 50}
    model = nn.ModuleDict(
        {
            "bags": CCEEmbeddingBagCollection(
                [CCEEmbeddingBagConfig(name="bag", num_embeddings=1000, **sizes)], device=META
            ),
            "sequences": CCEEmbeddingCollection(
                [
                    CCEEmbeddingConfig(name="wide", num_embeddings=1000, **sizes),
                    CCEEmbeddingConfig(name="narrow", num_embeddings=1000, num_columns=8, **sizes),
                    CCEEmbeddingConfig(name="large", num_embeddings=10**9, residents=ResidentConfig(), **sizes),
                    EmbeddingConfig(name="huge", num_embeddings=10**9, embedding_dim=16, feature_names=["huge"]),
                ],
                device=META,
            ),
        }
    )
    topology = planning_topology("cuda", world_size=8, device_bytes=40 * 2**30, host_bytes=10**12)
    plan = CCEShardingPlanner(topology=topology, batch_size=1024).plan(model, get_cce_sharders()).plan
    found = {
        table: (sharding.sharding_type, sharding.compute_kernel)
        for module in plan.values()
        for table, sharding in module.items()
    }
    assert found["narrow"] == ("data_parallel", "dense")
    assert found["huge"][0] == "row_wise"
    assert found["large_residents"][0] == "row_wise"
    assert found.keys() == {"bag", "wide", "narrow", "large", "large_residents", "huge"}


def small(name: str = "t", **changes: Any) -> CCEEmbeddingBagConfig:
    return CCEEmbeddingBagConfig(name=name, num_embeddings=10**6, embedding_dim=16, num_rows=100, **changes)


def kernels_on_one_rank(
    *collections: nn.Module,
    device: str = "cpu",
    constraints: dict[str, ParameterConstraints] | None = None,
    replicate: bool = True,
) -> dict[str, tuple[str, str]]:
    """Table → sharding type and kernel, for batches of 1024."""
    topology = planning_topology(device, world_size=1, device_bytes=GB, host_bytes=GB)
    planner = CCEShardingPlanner(
        topology=topology, batch_size=1024, constraints=constraints, replicate_on_one_rank=replicate
    )
    planner.plan(nn.ModuleList(collections), get_cce_sharders())
    return {each.table.split(".")[-1]: (each.sharding_type, each.compute_kernel) for each in planner.summary.tables}


PACKED, PLACED = ("data_parallel", "packed"), ("table_wise", "fused")


def test_small_tables_of_a_collection_are_replicated_on_one_rank() -> None:
    """Also a full one among them, and features of long bags allow more; a large one keeps all of them from it."""
    day = EmbeddingBagConfig(name="day", num_embeddings=7, embedding_dim=16, feature_names=["day"])
    large = cce("large", num_rows=10**4)
    assert kernels_on_one_rank(CCEEmbeddingBagCollection([small(), day], device=META)) == {"t": PACKED, "day": PACKED}
    collection = CCEEmbeddingBagCollection([small(), large], device=META)
    assert kernels_on_one_rank(collection) == {"t": PLACED, "large": PLACED}
    long_bags = {"large": ParameterConstraints(pooling_factors=[100.0])}
    assert kernels_on_one_rank(collection, constraints=long_bags) == {"t": PACKED, "large": PACKED}


def test_what_is_not_replicated_on_one_rank() -> None:
    signed = CompositionalEmbeddingBagConfig(
        name="s", num_embeddings=1000, embedding_dim=16, feature_names=["s"], num_rows=100, signed=True
    )
    dhe = DeepHashEmbeddingBagConfig(name="dhe", num_embeddings=90, embedding_dim=16, feature_names=["a"], width=8)
    for others in ([signed], [dhe]):
        found = kernels_on_one_rank(CCEEmbeddingBagCollection([small(), *others], device=META))
        assert found["t"] == PLACED
    residents = kernels_on_one_rank(
        CCEEmbeddingBagCollection([small(), small("r", residents=ResidentConfig())], device=META)
    )
    assert residents == {"t": PACKED, "r": PLACED, "r_residents": PLACED}
    sequences = CCEEmbeddingCollection(
        [CCEEmbeddingConfig(name="t", num_embeddings=1000, embedding_dim=16, num_rows=50)], device=META
    )
    assert kernels_on_one_rank(sequences) == {"t": PLACED}
    plain = EmbeddingBagConfig(name="t", num_embeddings=10, embedding_dim=16, feature_names=["t"])
    assert kernels_on_one_rank(EmbeddingBagCollection(tables=[plain], device=META)) == {"t": PLACED}

    table = small()
    both = CCEEmbeddingBagCollection([table, small("u")], device=META)
    assert set(kernels_on_one_rank(both, device="cuda").values()) == {PLACED}
    for wanted in (
        ParameterConstraints(sharding_types=["table_wise"]),
        ParameterConstraints(compute_kernels=["fused"]),
    ):
        assert set(kernels_on_one_rank(both, constraints={"u": wanted}).values()) == {PLACED}
    beside = CCEEmbeddingBagCollection([table, cce("large", num_rows=10**4)], device=META)
    assert set(kernels_on_one_rank(both, beside).values()) == {PLACED}  # `t` is in both
    assert set(kernels_on_one_rank(both, replicate=False).values()) == {PLACED}
    assert set(kernels_on_one_rank(both).values()) == {PACKED}
