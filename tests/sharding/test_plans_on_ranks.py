"""Plans on ranks: they train what one process would, a failure reaches every rank, and what cannot be is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, data_parallel, row_wise
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from tests.support.launch import on_ranks
from tests.support.module_cases import cce
from torchrec_cce import CCEEmbeddingBagCollection
from torchrec_cce.errors import CCEError, ConfigError
from torchrec_cce.sharding.planner import CCEShardingPlanner, planning_topology
from torchrec_cce.sharding.sharders import SHARDING_TYPES, get_cce_sharders
from torchrec_cce.training.parallel import process_group

BATCH = 16
"""Rows of the global batch."""


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
        cce("t_user", num_rows=9, num_embeddings=200),
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
        cce(f"t_{width}", (f"user_{width}",), num_rows=9, embedding_dim=12, num_columns=12 // width, num_embeddings=200)
        for width in (1, 2, 3, 4)
    ]
    placements = trained(tmp_path, tables, {"t_4": ParameterConstraints(sharding_types=["row_wise"])})
    assert placements == {"t_1": "data_parallel", "t_2": "data_parallel", "t_3": "data_parallel", "t_4": "row_wise"}


def fail_on_a_rank(where: str) -> str:
    """What `collective_plan` raises on this rank."""
    with process_group() as ranks:
        model = CCEEmbeddingBagCollection(
            [cce("t", num_rows=1000, embedding_dim=64, num_embeddings=10**6)], device=torch.device("meta")
        )
        topology = planning_topology(
            "cpu", world_size=2, device_bytes=0, host_bytes=10**6 if where == "maps" else 10**9
        )
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
        model = CCEEmbeddingBagCollection([cce("t", num_rows=9, embedding_dim=8, num_embeddings=50)])
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
