"""Collections and replicas whose tables are taken to be on a GPU: all but the copies to one and back."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, data_parallel
from torchrec.distributed.types import ShardingPlan

from tests.support.module_cases import cce, full, random_features
from torchrec_cce import CCEEmbeddingBagCollection, CompositionalEmbeddingBagConfig
from torchrec_cce.modules import word_lookup
from torchrec_cce.modules.device_lookup import DeviceLookup
from torchrec_cce.sharding.replicas import ShardedBags
from torchrec_cce.sharding.sharders import CCEEmbeddingBagCollectionSharder

SIZES = {"user": 1000, "friend": 1000, "word": 300, "day": 7}


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What Triton's kernels were asked for. They find tables on this device."""
    calls: list[str] = []

    def counting(name: str) -> Callable[..., object]:
        asked = getattr(DeviceLookup, name)
        return lambda *arguments: calls.append(name) or asked(*arguments)

    monkeypatch.setattr(word_lookup, "by_triton", lambda _: True)
    for name in ("pool", "add_gradients"):
        monkeypatch.setattr(DeviceLookup, name, counting(name))
    return calls


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def tables(pooling: PoolingType) -> list[EmbeddingBagConfig]:
    words = {"num_embeddings": 300, "feature_names": ["word"], "pooling": pooling}
    return [
        cce(features=("user", "friend"), embedding_dim=8, num_columns=2, num_rows=10, pooling=pooling),
        CompositionalEmbeddingBagConfig(name="ce", embedding_dim=8, num_rows=20, num_columns=2, num_terms=3, **words),
        full(pooling=pooling),
    ]


def clustered(pooling: str) -> CCEEmbeddingBagCollection:
    torch.manual_seed(0)
    collection = CCEEmbeddingBagCollection(
        tables(PoolingType.MEAN if pooling == "mean" else PoolingType.SUM), is_weighted=pooling == "weighted"
    )
    collection.recluster(seed=0)
    return collection


def features_of(seed: int, pooling: str) -> KeyedJaggedTensor:
    return random_features(SIZES, batch_size=9, max_length=2, seed=seed, weighted=pooling == "weighted")


def replicated(collection: CCEEmbeddingBagCollection) -> ShardingPlan:
    """All tables of a collection that is the first part of a model."""
    plan = construct_module_sharding_plan(
        collection.ebc,
        {table.name: data_parallel() for table in collection.embedding_bag_configs()},
        sharder=CCEEmbeddingBagCollectionSharder(),
        local_size=1,
        world_size=1,
        device_type="cpu",
    )
    return ShardingPlan(plan={"0.ebc": plan})


def losses(model: nn.Module, pooling: str, remap: Callable[[KeyedJaggedTensor], KeyedJaggedTensor]) -> list[float]:
    """Of four steps."""
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    found = []
    for step in range(4):
        optimizer.zero_grad()
        loss = (model(remap(features_of(step, pooling))).values() - 0.3).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def raw(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    return features


@pytest.mark.parametrize("pooling", ["sum", "mean", "weighted"])
def test_a_collection_trains_as_the_stock_collection_does(pooling: str, calls: list[str]) -> None:
    collection = clustered(pooling)
    twin = copy.deepcopy(collection)
    twin.ebc.register_forward_hook(lambda *_: None)  # so that it is called
    expected = losses(twin, pooling, raw)
    assert not calls
    assert losses(collection, pooling, raw) == pytest.approx(expected, rel=0, abs=1e-6)
    assert calls == ["pool", "add_gradients"] * 4
    for mine, theirs in zip(collection.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("given", ["raw IDs", "rows"])
def test_replicas_train_as_the_stock_collection_does(given: str, calls: list[str]) -> None:
    collection = clustered("sum")
    twin = copy.deepcopy(collection)
    twin.ebc.register_forward_hook(lambda *_: None)
    model = DistributedModelParallel(
        nn.Sequential(collection),
        device=torch.device("cpu"),
        plan=replicated(collection),
        sharders=[CCEEmbeddingBagCollectionSharder()],
    )
    model.load_state_dict({f"0.{name}": value for name, value in twin.state_dict().items()})
    stock = collection.ebc
    assert isinstance(stock, ShardedBags)
    assert stock.replicas == {table.name for table in collection.embedding_bag_configs()}
    remap = raw if given == "raw IDs" else collection.remap
    expected = losses(twin, "sum", raw)
    assert not calls
    assert losses(model, "sum", remap) == pytest.approx(expected, rel=0, abs=1e-6)
    assert calls.count("pool") == calls.count("add_gradients") > 0


def test_a_frozen_table_gets_no_gradient(calls: list[str]) -> None:
    collection = clustered("sum")
    frozen, *trained = collection.parameters()
    frozen.requires_grad_(False)
    collection(features_of(0, "sum")).values().sum().backward()
    assert calls == ["pool", "add_gradients"]
    assert frozen.grad is None
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained)
