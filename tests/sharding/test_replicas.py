"""Replicated tables on CPUs: looked up by our loops, they are trained as one process trains them with PyTorch's."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
from torchrec.distributed.batched_embedding_kernel import BaseBatchedEmbeddingBag
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import ParameterConstraints
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from tests.support.launch import on_ranks
from tests.support.module_cases import cce, full, random_features
from torchrec_cce import CCEEmbeddingBagCollection, ResidentConfig
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.errors import InvalidIDError
from torchrec_cce.modules.packed_lookup import PackedLookup
from torchrec_cce.sharding.admit import admit_sharded
from torchrec_cce.sharding.distributed_checkpoint import load_checkpoint
from torchrec_cce.sharding.planner import CCEShardingPlanner
from torchrec_cce.sharding.recluster import recluster_sharded
from torchrec_cce.sharding.replicas import RowLookup
from torchrec_cce.sharding.sharders import get_cce_sharders
from torchrec_cce.training.config import OptimizerConfig
from torchrec_cce.training.parallel import process_group, shard, table_optimizer

IDS = {"user": 1000, "friend": 1000, "item": 5000, "day": 7}
BATCH = 12
STEPS = 20
CLUSTER_AFTER = 10
OPTIMIZERS = ("sgd", "rowwise_adagrad", "adagrad", "adam", "adamw")
POOLINGS = ("sum", "mean", "weighted")
ONE_THREAD = ReclusterConfig(num_threads=1)


class Model(nn.Module):
    """Several features on a table and several tables on a feature; a narrow table, a full one, one without helper."""

    def __init__(self, pooling: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        kind = PoolingType.MEAN if pooling == "mean" else PoolingType.SUM
        tables: list[EmbeddingBagConfig] = [
            cce(features=("user", "friend"), pooling=kind),
            cce("t_item", ("item",), num_embeddings=5000, embedding_dim=24, num_rows=30, num_columns=3, pooling=kind),
            cce("t_narrow", ("item",), num_embeddings=5000, num_columns=8, use_helper=False, pooling=kind),
            full(pooling=PoolingType.SUM if pooling == "weighted" else PoolingType.MEAN),  # in a tensor by itself
        ]
        self.sparse = CCEEmbeddingBagCollection(tables, is_weighted=pooling == "weighted")
        self.dense = nn.Linear(sum(table.embedding_dim * len(table.feature_names) for table in tables), 1)

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        logits: torch.Tensor = self.dense(self.sparse(features).values())
        return logits.squeeze(1)


def batch_of(step: int, pooling: str, rows: slice) -> tuple[KeyedJaggedTensor, torch.Tensor]:
    """Part of a global batch: bags of 0 to 3 IDs, and labels."""
    whole = random_features(IDS, BATCH, 3, seed=step, weighted=pooling == "weighted")
    parts = [each.to_dense()[rows] for each in whole.to_dict().values()]
    weights = [each.to_dense_weights()[rows] for each in whole.to_dict().values()] if pooling == "weighted" else []
    features = KeyedJaggedTensor(
        keys=whole.keys(),
        values=torch.cat([bag for bags in parts for bag in bags]),
        lengths=torch.tensor([len(bag) for bags in parts for bag in bags]),
        weights=torch.cat([bag for bags in weights for bag in bags]) if weights else None,
    )
    return features, torch.tensor([float(row % 3 == 0) for row in range(BATCH)[rows]])


def configured(optimizer: str) -> OptimizerConfig:
    rate = 0.01 if optimizer.startswith("adam") else 0.1
    return OptimizerConfig(embedding=optimizer, embedding_learning_rate=rate, dense="sgd", dense_learning_rate=0.1)


def alone(optimizer: str, pooling: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of one process, with PyTorch's embedding bags and optimizers."""
    model = Model(pooling)
    model.sparse.ebc.register_forward_hook(lambda *_: None)  # so that it is called
    chosen = table_optimizer(configured(optimizer))
    tables = chosen.kind(model.sparse.parameters(), **chosen.arguments)
    dense = torch.optim.SGD(model.dense.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        if step == CLUSTER_AFTER:
            model.sparse.recluster(seed=1, optimizer=tables, settings=ONE_THREAD)
        features, labels = batch_of(step, pooling, slice(None))
        tables.zero_grad()
        dense.zero_grad()
        loss = binary_cross_entropy_with_logits(model(features), labels)
        loss.backward()
        tables.step()
        dense.step()
        losses.append(loss.item())
    return losses, dict(model.state_dict())


@contextmanager
def counted_lookups(*, fbgemm: bool = False) -> Iterator[dict[type, int]]:
    """How often something is looked up by words of codes and by rows; and never, if it may not, by `fbgemm`."""
    counts = {PackedLookup: 0, RowLookup: 0}

    def patched(kind: type) -> Any:
        before = kind.__call__

        def counting(self: Any, *arguments: Any, **named: Any) -> Any:
            counts[kind] += 1
            return before(self, *arguments, **named)

        return mock.patch.object(kind, "__call__", counting)

    refused = mock.patch.object(BaseBatchedEmbeddingBag, "forward", side_effect=AssertionError("looked up by FBGEMM"))
    with patched(PackedLookup), patched(RowLookup), nullcontext() if fbgemm else refused:
        yield counts


def placed(
    model: nn.Module, optimizer: str, kind: str, ranks: Any
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """The model on the ranks, with all tables as `kind` that a fused kernel can read."""
    constraints = {
        table.name: ParameterConstraints(sharding_types=["data_parallel" if table.name == "t_narrow" else kind])
        for table in model.sparse.embedding_bag_configs()
    }
    plan = CCEShardingPlanner(batch_size=BATCH // ranks.world_size, constraints=constraints).collective_plan(model)
    return shard(model, plan, configured(optimizer), ranks)


def train(
    model: DistributedModelParallel, optimizer: CombinedOptimizer, step: int, pooling: str, ranks: Any, *, by_rows: bool
) -> float:
    """The loss of the global batch."""
    share = BATCH // ranks.world_size
    features, labels = batch_of(step, pooling, slice(ranks.rank * share, (ranks.rank + 1) * share))
    if by_rows:
        features = model.module.sparse.remap(features)
    optimizer.zero_grad()
    loss = binary_cross_entropy_with_logits(model(features), labels)
    loss.backward()
    optimizer.step()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / ranks.world_size


CASES = [
    *((optimizer, "sum", False) for optimizer in OPTIMIZERS),
    *(("rowwise_adagrad", pooling, by_rows) for pooling in ("mean", "weighted") for by_rows in (False, True)),
    ("sgd", "sum", True),
]
"""Optimizer, pooling, and whether rows are given in the place of raw IDs."""
Outcome = tuple[list[float], dict[str, torch.Tensor]]


def on_a_rank() -> list[Outcome]:
    """Losses and weights of each case."""
    outcomes = []
    with process_group() as ranks:
        for name, pooling, by_rows in CASES:
            model, optimizer = placed(Model(pooling), name, "data_parallel", ranks)
            losses = []
            with counted_lookups() as counts:
                for step in range(STEPS):
                    if step == CLUSTER_AFTER:
                        recluster_sharded(model, optimizer, seed=1, settings=ONE_THREAD)
                    losses.append(train(model, optimizer, step, pooling, ranks, by_rows=by_rows))
            kernels = 2 if pooling == "sum" else 1  # of which each has one kind of pooling
            assert counts == {PackedLookup: 0 if by_rows else STEPS, RowLookup: kernels * STEPS if by_rows else 0}
            outcomes.append((losses, {name: value.clone() for name, value in model.state_dict().items()}))
    return outcomes


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_train_as_one_process(tmp_path: Path, world_size: int) -> None:
    """With every optimizer, kind of pooling, and per-sample weights; clustered in the middle."""
    finished = on_ranks(tmp_path, world_size, on_a_rank)
    for rank in finished:
        assert rank.code == 0, rank.stderr
    for (name, pooling, by_rows), *found in zip(CASES, *(rank.value for rank in finished), strict=True):
        losses, weights = alone(name, pooling)
        assert losses[-1] < losses[0]
        for mine, state in found:
            assert mine == pytest.approx(losses, rel=0, abs=1e-6), (name, pooling, by_rows)
            assert state.keys() == weights.keys()
            for key, value in weights.items():
                # Adagrad divides: where gradients cancel each other, their rounding grows.
                torch.testing.assert_close(
                    state[key], value, rtol=0, atol=1e-5, msg=f"{name} {pooling} {by_rows} {key}"
                )


def between_kernels(folder: Path) -> list[dict[str, Any]]:
    """What is saved of tables in a fused kernel and then loaded into replicas, trained, saved, and loaded back."""
    found = []
    with process_group() as ranks:
        for step, kind in enumerate(("table_wise", "data_parallel", "table_wise")):
            model, optimizer = placed(Model("sum"), "rowwise_adagrad", kind, ranks)
            if step:
                load_checkpoint(folder / str(step - 1), model, optimizer)
                found.append(contents(model, optimizer))
            train(model, optimizer, step, "sum", ranks, by_rows=False)
            found.append(contents(model, optimizer))
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoint.save(state, checkpoint_id=folder / str(step))
    return found


def contents(model: DistributedModelParallel, optimizer: CombinedOptimizer) -> dict[str, Any]:
    """Copies of weights, and of the accumulators of tables."""
    states = {
        (key, "sum"): next(v for name, v in entries.items() if name.endswith((".momentum1", "sum")))
        for key, entries in optimizer.state_dict()["state"].items()
        if "sparse" in key
    }
    values = {**model.state_dict(), **states}
    whole = {key: v.local_shards()[0].tensor if hasattr(v, "local_shards") else v for key, v in values.items()}
    return {key: value.detach().reshape(-1).clone() for key, value in whole.items()}


def test_checkpoints_move_between_fused_kernels_and_replicas(tmp_path: Path) -> None:
    (rank,) = on_ranks(tmp_path / "rank", 1, between_kernels, tmp_path)
    assert rank.code == 0, rank.stderr
    fused, loaded, replicated, loaded_back, _ = rank.value
    for saved, found in ((fused, loaded), (replicated, loaded_back)):
        assert saved.keys() == found.keys()
        assert len([key for key in saved if key[1] == "sum"]) == 4
        assert all(torch.equal(value, found[key]) for key, value in saved.items())
    assert not torch.equal(
        fused["sparse.ebc.embedding_bags.t_user.weight"], replicated["sparse.ebc.embedding_bags.t_user.weight"]
    )


def without_gradients() -> list[tuple[dict[type, int], torch.Tensor, torch.Tensor]]:
    """What one rank looks up where nothing is noted for a backward pass: how, what, and what kernels find in rows.

    Of tables with fused kernels beside replicas; then of residents' codewords while their rows are trained.
    """
    found = []
    with process_group() as ranks:
        for pooling in POOLINGS:
            model, _ = placed(Model(pooling), "rowwise_adagrad", "table_wise", ranks)
            features, _ = batch_of(0, pooling, slice(None))
            with torch.no_grad(), counted_lookups() as counts:
                packed = model(features)
            found.append((counts, packed, model(model.module.sparse.remap(features)).detach()))
        tables = [cce(features=("user", "friend"), residents=ResidentConfig(shrinkage=0)), full()]
        collection = CCEEmbeddingBagCollection(tables)
        collection.recluster(seed=0)
        apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), {"lr": 0.1})
        plan = CCEShardingPlanner(batch_size=BATCH).collective_plan(collection)
        sharded = DistributedModelParallel(collection, plan=plan, sharders=get_cce_sharders(), device=ranks.device)
        admit_sharded(sharded, sharded.fused_optimizer, seed=0)
        features, _ = batch_of(0, "sum", slice(None))
        for _ in range(2):
            with counted_lookups(fbgemm=True) as counts:
                pooled = sharded(features).values()
            found.append((counts, pooled.detach(), sharded(collection.remap(features)).values().detach()))
            pooled.square().mean().backward()
    return found


def test_one_rank_looks_up_packed_what_it_does_not_train(tmp_path: Path) -> None:
    (rank,) = on_ranks(tmp_path, 1, without_gradients)
    assert rank.code == 0, rank.stderr
    *_, (_, before, _), (_, after, _) = rank.value
    for counts, packed, by_rows in rank.value:
        assert counts == {PackedLookup: 1, RowLookup: 0}
        torch.testing.assert_close(packed, by_rows, rtol=0, atol=1e-6)
    assert not torch.equal(before, after)  # rows learn


def look_up_what_is_not_there() -> list[str]:
    """Messages of the errors of an ID and of a row outside a table; then both are trained without."""
    messages = []
    with process_group() as ranks:
        model, optimizer = placed(Model("sum"), "sgd", "data_parallel", ranks)
        features, _ = batch_of(0, "sum", slice(None))
        rows = model.module.sparse.remap(features)
        for given, value in ((features, 1000), (rows, 80), (rows, -1)):
            before = given.values()[0].item()
            given.values()[0] = value
            with pytest.raises(InvalidIDError) as caught:
                model(given)
            messages.append(str(caught.value))
            given.values()[0] = before
        assert torch.equal(model(features), model(rows))
        train(model, optimizer, 0, "sum", ranks, by_rows=False)
        fused, _ = placed(Model("sum"), "sgd", "table_wise", ranks)
        rows.values()[0] = 80
        with pytest.raises(RuntimeError, match="80"):  # FBGEMM's own check
            fused(rows)
    return messages


def test_an_id_or_a_row_outside_its_table_is_named(tmp_path: Path) -> None:
    (rank,) = on_ranks(tmp_path, 1, look_up_what_is_not_there)
    assert rank.code == 0, rank.stderr
    of_an_id, *of_rows = rank.value
    assert of_an_id.startswith("feature 'user': raw ID 1000 (position 0 ")
    for row, message in zip((80, -1), of_rows, strict=True):
        assert message.startswith(f"feature 'user#t_user#0': row {row} (position 0 of its ")
        assert "is not in 0..79, the rows of table 't_user'" in message
