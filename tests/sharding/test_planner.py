"""Plans: what is picked, that it trains what one process would, and that no rank waits for one that failed."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor, PoolingType
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, data_parallel, row_wise
from torchrec.distributed.types import ShardingEnv, ShardingPlan, ShardingType
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from tests.support.launch import on_ranks
from torchrec_cce import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig, CCEEmbeddingCollection, CCEEmbeddingConfig
from torchrec_cce.errors import CCEError, ConfigError
from torchrec_cce.sharding.planner import CCEShardingPlanner, planning_topology
from torchrec_cce.sharding.sharders import SHARDING_TYPES, get_cce_sharders
from torchrec_cce.training.parallel import process_group

GB = 10**9
BATCH = 16
"""Rows of the global batch."""
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


class Model(nn.Module):
    """Embeddings and one dense layer on them."""

    def __init__(self, tables: list[EmbeddingBagConfig]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sparse = CCEEmbeddingBagCollection(tables)
        self.dense = nn.Linear(sum(table.embedding_dim for table in tables), 1)

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        logits: torch.Tensor = self.dense(self.sparse(features).values())
        return logits.squeeze(1)


def batch_of(tables: list[EmbeddingBagConfig], rows: range) -> tuple[KeyedJaggedTensor, torch.Tensor]:
    """A part of one global batch: bags of 0 to 3 IDs, and labels."""
    bags = [
        [
            [(31 * row + 7 * i + 13 * place) % table.num_embeddings for place in range((row + i) % 4)]
            for row in range(BATCH)
        ]
        for i, table in enumerate(tables)
    ]
    mine = [[bag[row] for row in rows] for bag in bags]
    features = KeyedJaggedTensor(
        keys=[feature for table in tables for feature in table.feature_names],
        values=torch.tensor([value for bag in mine for one in bag for value in one]),
        lengths=torch.tensor([len(one) for bag in mine for one in bag]),
    )
    return features, torch.tensor([float(row % 3 == 0) for row in rows])


def losses_of_one_process(tables: list[EmbeddingBagConfig], steps: int) -> list[float]:
    model = Model(tables)
    optimizers = [RowWiseAdagrad(model.sparse.parameters(), lr=0.1), torch.optim.SGD(model.dense.parameters(), lr=0.1)]
    losses = []
    for _ in range(steps):
        features, labels = batch_of(tables, range(BATCH))
        loss = nn.functional.binary_cross_entropy_with_logits(model(features), labels)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses


def train_on_a_rank(
    tables: list[EmbeddingBagConfig], constraints: dict[str, ParameterConstraints], steps: int
) -> tuple[list[float], dict[str, str]]:
    """Losses of the global batch, and the placements, with nothing but TorchRec's own calls around the planner."""
    with process_group() as ranks:
        model = Model(tables)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        apply_optimizer_in_backward(RowWiseAdagrad, model.sparse.parameters(), {"lr": 0.1})
        planner = CCEShardingPlanner(batch_size=BATCH // ranks.world_size, constraints=constraints)
        plan = planner.collective_plan(model, get_cce_sharders(), dist.GroupMember.WORLD)
        sharded = DistributedModelParallel(model, device=ranks.device, plan=plan, sharders=get_cce_sharders())
        sharded.load_state_dict(weights)
        rest = dict(in_backward_optimizer_filter(sharded.named_parameters()))
        replicated = [value for name, value in rest.items() if name.startswith("sparse.")]
        optimizers: list[Any] = [
            sharded.fused_optimizer,
            torch.optim.SGD([value for name, value in rest.items() if not name.startswith("sparse.")], lr=0.1),
            *([RowWiseAdagrad(replicated, lr=0.1)] if replicated else []),
        ]
        share = BATCH // ranks.world_size
        losses = []
        for _ in range(steps):
            features, labels = batch_of(tables, range(ranks.rank * share, (ranks.rank + 1) * share))
            loss = nn.functional.binary_cross_entropy_with_logits(sharded(features), labels)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            total = loss.detach().clone()
            dist.all_reduce(total)
            losses.append(total.item() / ranks.world_size)
        summary = {one.table.rpartition(".")[2]: one.sharding_type for one in planner.summary.tables}
        assert summary == {name: one.sharding_type for name, one in plan.plan["sparse.ebc"].items()}
        return losses, summary


def trained(folder: Path, tables: list[EmbeddingBagConfig], constraints: dict[str, ParameterConstraints]) -> Any:
    finished = on_ranks(folder, 2, train_on_a_rank, tables, constraints, 3)
    for rank in finished:
        assert rank.code == 0, rank.stderr
    first, second = (rank.value for rank in finished)
    assert first == second
    losses, placements = first
    assert losses == pytest.approx(losses_of_one_process(tables, 3), abs=1e-6)
    assert losses[2] < losses[1] < losses[0]
    return placements


@pytest.mark.parametrize("kind", SHARDING_TYPES)
def test_every_placement_trains_as_one_process(tmp_path: Path, kind: str) -> None:
    """Also beside means of a table that is split by rows, where TorchRec divides too much."""
    tables: list[EmbeddingBagConfig] = [
        cce("t_user", num_rows=9, dim=16, n=200),
        EmbeddingBagConfig(
            name="t_item", num_embeddings=50, embedding_dim=8, feature_names=["item"], pooling=PoolingType.MEAN
        ),
    ]
    constraints = {
        "t_user": ParameterConstraints(sharding_types=[kind]),
        "t_item": ParameterConstraints(sharding_types=["row_wise"]),
    }
    assert trained(tmp_path, tables, constraints)["t_user"] == kind


def test_narrow_columns_train_as_one_process(tmp_path: Path) -> None:
    tables: list[EmbeddingBagConfig] = [
        cce(f"t_{width}", num_rows=9, dim=12, num_columns=12 // width, n=200) for width in (1, 2, 3, 4)
    ]
    placements = trained(tmp_path, tables, {"t_4": ParameterConstraints(sharding_types=["row_wise"])})
    assert placements == {"t_1": "data_parallel", "t_2": "data_parallel", "t_3": "data_parallel", "t_4": "row_wise"}


def fail_on_a_rank(where: str) -> str:
    """What `collective_plan` raises on this rank."""
    with process_group() as ranks:
        model = CCEEmbeddingBagCollection([cce("t", num_rows=1000, n=10**6)], device=META)
        topology = planning_topology("cpu", world_size=2, device_bytes=0, host_bytes=10**6 if where == "maps" else GB)
        sharders = get_cce_sharders()
        if where == "bug" and ranks.is_first:
            sharders[0].shardable_parameters = lambda _: 1 / 0  # type: ignore[method-assign]
        planner = CCEShardingPlanner(topology=topology, batch_size=10**9 if where == "batch" else 8)
        try:
            planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
        except (CCEError, ZeroDivisionError) as error:
            return f"{type(error).__name__}: {error}"
        return ""


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("maps", "ConfigError: no plan: the index-pointer maps need 8.0 MB"),
        ("batch", "ConfigError: no plan: the tables need at least"),
        ("bug", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_failure_reaches_every_rank(tmp_path: Path, where: str, message: str) -> None:
    messages = [rank.value for rank in on_ranks(tmp_path, 2, fail_on_a_rank, where)]
    assert messages[0] == messages[1]
    assert messages[0].startswith(message)


def shard_narrow_columns_by_rows() -> str:
    with process_group() as ranks:
        model = CCEEmbeddingBagCollection([cce("t", num_rows=9, dim=8, num_columns=4, n=50)])
        sharders = get_cce_sharders()
        module_plan = construct_module_sharding_plan(
            model.ebc,
            {"t": row_wise(compute_kernel="fused")},
            sharder=sharders[0],
            local_size=1,
            world_size=ranks.world_size,
            device_type="cpu",
        )
        try:
            DistributedModelParallel(
                model, device=ranks.device, plan=ShardingPlan({"ebc": module_plan}), sharders=sharders
            )
        except ConfigError as error:
            return str(error)
        return ""


def test_a_plan_that_fbgemm_cannot_carry_out_is_refused(tmp_path: Path) -> None:
    (rank,) = on_ranks(tmp_path, 1, shard_narrow_columns_by_rows)
    assert rank.value.startswith("table 't': the plan has kernel 'fused' for rows of 2 floats; FBGEMM's fused kernels")


def pool_a_feature_in_two_ways() -> str:
    with process_group() as ranks:
        tables = [
            EmbeddingBagConfig(
                name=pooling.name, num_embeddings=9, embedding_dim=4, feature_names=["f"], pooling=pooling
            )
            for pooling in (PoolingType.SUM, PoolingType.MEAN)
        ]
        model = EmbeddingBagCollection(tables=tables)
        sharders = get_cce_sharders()
        module_plan = construct_module_sharding_plan(
            model,
            {"SUM": data_parallel(), "MEAN": row_wise(compute_kernel="fused")},
            sharder=sharders[0],
            local_size=1,
            world_size=ranks.world_size,
            device_type="cpu",
        )
        try:
            sharders[0].shard(model, module_plan, ShardingEnv.from_process_group(dist.GroupMember.WORLD), ranks.device)
        except ConfigError as error:
            return str(error)
        return ""


def test_a_feature_that_torchrec_would_pool_wrongly_is_refused(tmp_path: Path) -> None:
    (rank,) = on_ranks(tmp_path, 1, pool_a_feature_in_two_ways)
    assert rank.value.startswith("features ['f'] of table 'SUM' are also mean-pooled by a table that is split by rows")


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
    assert found.keys() == {"bag", "wide", "narrow", "huge"}
