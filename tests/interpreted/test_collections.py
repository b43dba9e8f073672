"""Collections and replicas whose tables are taken to be on a GPU: all but the copies to one and back."""

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel

from tests.support.device_lookups import POOLINGS, clustered, counted_calls, features_of, losses, replicated
from torchrec_cce import CCEEmbeddingBagCollection
from torchrec_cce.modules import word_lookup
from torchrec_cce.sharding.replicas import ShardedBags
from torchrec_cce.sharding.sharders import CCEEmbeddingBagCollectionSharder


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What Triton's kernels were asked for. They find tables on this device."""
    monkeypatch.setattr(word_lookup, "by_triton", lambda _: True)
    with counted_calls() as calls:
        yield calls


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def adagrad(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(model.parameters(), lr=0.1)


def looked_up_by_rows(collection: CCEEmbeddingBagCollection) -> CCEEmbeddingBagCollection:
    twin = copy.deepcopy(collection)
    twin.ebc.register_forward_hook(lambda *_: None)  # so that it is called
    return twin


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_collection_trains_as_the_stock_collection_does(pooling: str, calls: list[str]) -> None:
    collection = clustered(pooling)
    twin = looked_up_by_rows(collection)
    expected = losses(twin, pooling, adagrad(twin), lambda raw: raw)
    assert not calls
    assert losses(collection, pooling, adagrad(collection), lambda raw: raw) == pytest.approx(expected, rel=0, abs=1e-6)
    assert calls == ["pool", "add_gradients"] * 4
    for mine, theirs in zip(collection.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("given", ["raw IDs", "rows"])
def test_replicas_train_as_the_stock_collection_does(given: str, calls: list[str]) -> None:
    collection = clustered("sum")
    twin = looked_up_by_rows(collection)
    model = DistributedModelParallel(
        nn.Sequential(collection),
        device=torch.device("cpu"),
        plan=replicated(collection.ebc, "0.ebc"),
        sharders=[CCEEmbeddingBagCollectionSharder()],
    )
    model.load_state_dict({f"0.{name}": value for name, value in twin.state_dict().items()})
    stock = collection.ebc
    assert isinstance(stock, ShardedBags)
    assert stock.replicas == {table.name for table in collection.embedding_bag_configs()}
    expected = losses(twin, "sum", adagrad(twin), lambda raw: raw)
    assert not calls
    remap = collection.remap if given == "rows" else lambda raw: raw
    assert losses(model, "sum", adagrad(model), remap) == pytest.approx(expected, rel=0, abs=1e-6)
    assert calls.count("pool") == calls.count("add_gradients") > 0


def test_a_frozen_table_gets_no_gradient(calls: list[str]) -> None:
    collection = clustered("sum")
    frozen, *trained = collection.parameters()
    frozen.requires_grad_(False)
    collection(features_of(0, "sum")).values().sum().backward()
    assert calls == ["pool", "add_gradients"]
    assert frozen.grad is None
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained)
