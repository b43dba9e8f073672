"""A collection that can be looked up from words, and its training, wherever its tables are."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, data_parallel
from torchrec.distributed.types import ShardingPlan

from tests.support.module_cases import cce, full, random_features
from torchrec_cce import CCEEmbeddingBagCollection, CompositionalEmbeddingBagConfig
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.modules.device_lookup import DeviceLookup
from torchrec_cce.sharding.sharders import CCEEmbeddingBagCollectionSharder

POOLINGS = ("sum", "mean", "weighted")
_SIZES = {"user": 1000, "friend": 1000, "word": 300, "day": 7}

Step = Callable[[KeyedJaggedTensor], KeyedJaggedTensor]


def tables(pooling: PoolingType) -> list[EmbeddingBagConfig]:
    words = {"num_embeddings": 300, "feature_names": ["word"], "pooling": pooling}
    return [
        cce(features=("user", "friend"), embedding_dim=8, num_columns=2, num_rows=10, pooling=pooling),
        CompositionalEmbeddingBagConfig(name="ce", embedding_dim=8, num_rows=20, num_columns=2, num_terms=3, **words),
        full(pooling=pooling),
    ]


def clustered(pooling: str) -> CCEEmbeddingBagCollection:
    """On the CPU."""
    torch.manual_seed(0)
    collection = CCEEmbeddingBagCollection(
        tables(PoolingType.MEAN if pooling == "mean" else PoolingType.SUM), is_weighted=pooling == "weighted"
    )
    collection.recluster(seed=0, settings=ReclusterConfig(num_threads=1))
    return collection


def features_of(seed: int, pooling: str, batch_size: int = 9) -> KeyedJaggedTensor:
    return random_features(_SIZES, batch_size, max_length=2, seed=seed, weighted=pooling == "weighted")


def losses(
    model: nn.Module, pooling: str, optimizer: torch.optim.Optimizer, given: Step, *, steps: int = 4
) -> list[float]:
    """Of so many steps.

    Args:
        given: raw IDs in the memory of the host → what goes into the model.
    """
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = (model(given(features_of(step, pooling))).values() - 0.3).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def replicated(stock: nn.Module, path: str, device_type: str = "cpu") -> ShardingPlan:
    """All tables of the stock collection at `path` of a model, on each rank of one."""
    plan = construct_module_sharding_plan(
        stock,
        {table.name: data_parallel() for table in stock.embedding_bag_configs()},
        sharder=CCEEmbeddingBagCollectionSharder(),
        local_size=1,
        world_size=1,
        device_type=device_type,
    )
    return ShardingPlan(plan={path: plan})


@contextmanager
def counted_calls() -> Iterator[list[str]]:
    """What Triton's kernels are asked for."""
    calls: list[str] = []

    def counting(name: str) -> Callable[..., object]:
        asked = getattr(DeviceLookup, name)
        return lambda *arguments: calls.append(name) or asked(*arguments)

    names = ("pool", "add_gradients")
    with mock.patch.multiple(DeviceLookup, **{name: counting(name) for name in names}):
        yield calls
