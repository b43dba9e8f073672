"""Sharded sequence embeddings give the outputs and the training of one process."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingConfig, JaggedTensor, KeyedJaggedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, data_parallel, row_wise, table_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from tests.support.launch import on_ranks
from torchrec_cce import CCEEmbeddingCollection, CCEEmbeddingConfig, CompositionalEmbeddingConfig
from torchrec_cce.errors import ConfigError
from torchrec_cce.sharding.sharders import CCEEmbeddingCollectionSharder
from torchrec_cce.training.parallel import process_group

STEPS = 20
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, float]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.5}),
    "rowwise_adagrad": (RowWiseAdagrad, {"lr": 0.1, "eps": 1e-8}),
}
PLACEMENTS = {
    # table → how it is placed; in the last, one inner collection is sharded in several ways
    "data_parallel": dict.fromkeys(("user", "item", "shop", "day"), "data_parallel"),
    "table_wise": {"user": "rank 0", "item": "rank 1", "shop": "rank 1", "day": "rank 0"},
    "row_wise": dict.fromkeys(("user", "item", "shop", "day"), "row_wise"),
    "mixed": {"user": "row_wise", "item": "data_parallel", "shop": "rank 1", "day": "data_parallel"},
}
SHARDERS = {"stock": EmbeddingCollectionSharder, "own": CCEEmbeddingCollectionSharder}


class Trained(NamedTuple):
    """What a rank saw: its outputs at every step as (values, lengths, weights), and all tables at the end."""

    outputs: list[dict[str, tuple[torch.Tensor, ...]]]
    weights: dict[str, torch.Tensor]


class Sequences(nn.Module):
    """The collection below a path of its own, as in a model."""

    def __init__(self, narrow: bool) -> None:
        super().__init__()
        # Under others, Adagrad's first step of a row with next to no gradient makes 1e-5 of the last bit of a weight.
        torch.manual_seed(3)
        sizes = {"num_embeddings": 300, "embedding_dim": 16, "num_rows": 9}
        columns = 8 if narrow else 4
        self.collection = CCEEmbeddingCollection(
            tables=[
                CCEEmbeddingConfig(name="user", feature_names=["user", "friend"], **sizes),
                EmbeddingConfig(name="day", num_embeddings=7, embedding_dim=16, feature_names=["day", "user"]),
                CCEEmbeddingConfig(name="item", num_columns=columns, **sizes),
                CompositionalEmbeddingConfig(name="shop", num_columns=columns, num_terms=3, **sizes),
            ],
            need_indices=True,
        )
        self.collection.recluster(seed=0)
        self.output = nn.Linear(16, 1, bias=False)

    def forward(self, features: KeyedJaggedTensor) -> tuple[torch.Tensor, dict[str, JaggedTensor]]:
        sequences = self.collection(features)
        scores = [self.output(one.values()).square().sum() for one in sequences.values()]
        return torch.stack(scores).sum() / features.stride(), sequences


def part_of_batch(step: int, rank: int) -> KeyedJaggedTensor:
    """Bags of 0 to 3 IDs; an unused feature; another order than the tables'."""
    rng = np.random.default_rng([step, rank])
    keys = {"shop": 300, "friend": 300, "unused": 9, "user": 7, "item": 300, "day": 7}
    lengths = [rng.integers(0, 4, 5) for _ in keys]
    values = [rng.integers(0, n, size.sum()) for n, size in zip(keys.values(), lengths, strict=True)]
    return KeyedJaggedTensor(
        keys=list(keys),
        values=torch.from_numpy(np.concatenate(values)),
        lengths=torch.from_numpy(np.concatenate(lengths)),
    )


def copied(sequences: dict[str, JaggedTensor]) -> dict[str, tuple[torch.Tensor, ...]]:
    return {
        name: (one.values().detach().clone(), one.lengths().clone(), one.weights().clone())
        for name, one in sequences.items()
    }


def train_alone(optimizer: str, narrow: bool) -> list[Trained]:
    """What each of two ranks must see."""
    model = Sequences(narrow)
    kind, arguments = OPTIMIZERS[optimizer]
    optimizers = [kind(model.collection.parameters(), **arguments), torch.optim.SGD(model.output.parameters(), lr=0.1)]
    outputs: list[list[dict[str, tuple[torch.Tensor, ...]]]] = [[], []]
    for step in range(STEPS):
        model.zero_grad()
        for rank in range(2):
            loss, sequences = model(part_of_batch(step, rank))
            (loss / 2).backward()
            outputs[rank].append(copied(sequences))
        for each in optimizers:
            each.step()
    return [Trained(each, {n: p.detach() for n, p in model.collection.named_parameters()}) for each in outputs]


def sharded(
    model: Sequences, placement: dict[str, str], sharder: EmbeddingCollectionSharder
) -> DistributedModelParallel:
    spread = {"data_parallel": data_parallel(), "row_wise": row_wise()}
    spread |= {f"rank {rank}": table_wise(rank=rank) for rank in range(2)}
    plans = {
        f"collection.ecs.{width}": construct_module_sharding_plan(
            inner,
            {table.name: spread[placement[table.name]] for table in inner.embedding_configs()},
            sharder=sharder,
            local_size=2,
            world_size=2,
            device_type="cpu",
        )
        for width, inner in model.collection.ecs.items()
    }
    return DistributedModelParallel(
        model, device=torch.device("cpu"), plan=ShardingPlan(plan=plans), sharders=[sharder]
    )


def whole(value: Any) -> torch.Tensor:
    """A sharded or replicated tensor."""
    if not hasattr(value, "local_shards"):
        return value.detach().clone()
    mine = [(shard.metadata.shard_offsets[0], shard.tensor.detach().clone()) for shard in value.local_shards()]
    parts: list[list[tuple[int, torch.Tensor]]] = [[], []]
    dist.all_gather_object(parts, mine)
    return torch.cat([tensor for _, tensor in sorted((p for each in parts for p in each), key=lambda pair: pair[0])])


def train_on_a_rank(optimizer: str, placement: str, sharder: str, narrow: bool) -> Trained:
    with process_group() as ranks:
        model = Sequences(narrow)
        kind, arguments = OPTIMIZERS[optimizer]
        fused = [
            model.collection.get_parameter(model.collection.weight_name(table))
            for table, where in PLACEMENTS[placement].items()
            if where != "data_parallel"
        ]
        if fused:
            apply_optimizer_in_backward(kind, fused, dict(arguments))  # TorchRec adds to it
        parallel = sharded(model, PLACEMENTS[placement], SHARDERS[sharder]())
        rest = dict(in_backward_optimizer_filter(parallel.named_parameters()))
        dense = {name: rest.pop(name) for name in list(rest) if "output" in name}
        optimizers = [torch.optim.SGD(dense.values(), lr=0.1)]
        if rest:
            optimizers.append(kind(rest.values(), **arguments))
        outputs = []
        for step in range(STEPS):
            for each in optimizers:
                each.zero_grad()
            loss, sequences = parallel(part_of_batch(step, ranks.rank))
            loss.backward()
            for each in optimizers:
                each.step()
            outputs.append(copied(sequences))
        state = parallel.state_dict()
        tables = [*model.collection.cce_tables(), "shop", "day"]
        names = [model.collection.weight_name(table) for table in tables]
        return Trained(outputs, {name: whole(state[f"collection.{name}"]) for name in names})


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("placement", "sharder", "narrow"),
    [
        ("table_wise", "stock", False),
        ("row_wise", "stock", False),
        ("data_parallel", "own", True),
        ("mixed", "own", False),
    ],
)
def test_two_ranks_compute_what_one_process_does(
    placement: str, sharder: str, narrow: bool, optimizer: str, tmp_path: Path
) -> None:
    expected = train_alone(optimizer, narrow)
    finished = on_ranks(tmp_path, 2, train_on_a_rank, optimizer, placement, sharder, narrow)
    start = Sequences(narrow).collection.state_dict()
    for rank, alone in zip(finished, expected, strict=True):
        assert rank.code == 0, rank.stderr
        for ours, theirs in zip(rank.value.outputs, alone.outputs, strict=True):
            assert ours.keys() == theirs.keys() == {"user@user", "friend", "day", "user@day", "item", "shop"}
            for name, (values, lengths, ids) in theirs.items():
                torch.testing.assert_close(ours[name][0], values, atol=1e-6, rtol=0)
                assert torch.equal(ours[name][1], lengths)
                assert torch.equal(ours[name][2], ids)
        assert rank.value.weights.keys() == alone.weights.keys()
        for name, weight in alone.weights.items():
            assert (weight - start[name]).abs().max() > 0.01, "an untrained table proves nothing"
            torch.testing.assert_close(rank.value.weights[name], weight, atol=1e-6, rtol=0)


def errors_on_a_rank() -> list[str]:
    """What is said of narrow rows, and of what needs whole tables."""
    with process_group():
        messages = []
        for narrow in (True, False):
            model = Sequences(narrow)
            apply_optimizer_in_backward(torch.optim.SGD, model.collection.parameters(), {"lr": 0.1})
            try:
                sharded(model, PLACEMENTS["row_wise"], CCEEmbeddingCollectionSharder())
                model.collection.recluster(seed=1)
            except ConfigError as error:
                messages.append(str(error))
        return messages


def test_what_is_refused(tmp_path: Path) -> None:
    for rank in on_ranks(tmp_path, 2, errors_on_a_rank):
        assert rank.code == 0, rank.stderr
        narrow, whole_tables = rank.value
        assert narrow.startswith(
            "table 'item': the plan has kernel 'fused' for rows of 2 floats; FBGEMM's fused kernels"
        )
        assert whole_tables == "the tables are sharded; use torchrec_cce.sharding, which gathers them from all ranks"
    assert set(CCEEmbeddingCollectionSharder().sharding_types("cpu")) == {"data_parallel", "table_wise", "row_wise"}
