"""Tables on a GPU against the same on the CPU: embeddings, gradients, and twenty steps of each optimizer."""

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from tests.support.device_lookups import POOLINGS, clustered, counted_calls, features_of, losses, replicated
from tests.support.parity import CUDA_TOLERANCE
from torchrec_cce.sharding.replicas import ShardedBags
from torchrec_cce.sharding.sharders import CCEEmbeddingBagCollectionSharder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is false: no CUDA device"),
]
STEPS = 20
OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=1.0),
    "adagrad": partial(torch.optim.Adagrad, lr=0.1, eps=1e-8),
    "rowwise_adagrad": partial(RowWiseAdagrad, lr=0.1, eps=1e-8),
    "adam": partial(torch.optim.Adam, lr=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01),
}


def on_the_host(raw: KeyedJaggedTensor) -> KeyedJaggedTensor:
    return raw


def on_the_device(raw: KeyedJaggedTensor) -> KeyedJaggedTensor:
    return raw.to(torch.device("cuda", 0))


@pytest.fixture
def calls() -> Iterator[list[str]]:
    with counted_calls() as calls:
        yield calls


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("given", [on_the_host, on_the_device])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("batch_size", [0, 1, 3000])
def test_embeddings_and_gradients(
    batch_size: int, pooling: str, given: Callable[[KeyedJaggedTensor], KeyedJaggedTensor], calls: list[str]
) -> None:
    collection = clustered(pooling)
    twin = copy.deepcopy(collection).to("cuda")
    features = features_of(1, pooling, batch_size)
    expected, found = collection(features).values(), twin(given(features)).values()
    torch.testing.assert_close(found.cpu(), expected, rtol=CUDA_TOLERANCE, atol=CUDA_TOLERANCE)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found * weights.cuda()).sum().backward()
    assert calls == ["pool", "add_gradients"]
    for mine, theirs in zip(twin.parameters(), collection.parameters(), strict=True):
        # Rows of thousands of IDs are sums of as many numbers, which are added in another order.
        torch.testing.assert_close(mine.grad.cpu(), theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_twenty_steps(optimizer: str, pooling: str, calls: list[str]) -> None:
    collection = clustered(pooling)
    twin, make = copy.deepcopy(collection).to("cuda"), OPTIMIZERS[optimizer]
    expected = losses(collection, pooling, make(collection.parameters()), on_the_host, steps=STEPS)
    found = losses(twin, pooling, make(twin.parameters()), on_the_host, steps=STEPS)
    assert found == pytest.approx(expected, rel=0, abs=CUDA_TOLERANCE)
    assert calls == ["pool", "add_gradients"] * STEPS


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("form", ["raw IDs", "rows"])
def test_replicas(form: str, calls: list[str]) -> None:
    twin = clustered("sum")
    collection = copy.deepcopy(twin).to("cuda")
    model = DistributedModelParallel(
        nn.Sequential(collection),
        device=torch.device("cuda", 0),
        plan=replicated(collection.ebc, "0.ebc", "cuda"),
        sharders=[CCEEmbeddingBagCollectionSharder()],
    )
    model.load_state_dict({f"0.{name}": value for name, value in twin.state_dict().items()})
    stock = collection.ebc
    assert isinstance(stock, ShardedBags)
    assert stock.replicas == {table.name for table in collection.embedding_bag_configs()}
    make = OPTIMIZERS["adagrad"]
    expected = losses(twin, "sum", make(twin.parameters()), on_the_host, steps=STEPS)
    remap = collection.remap if form == "rows" else on_the_host
    found = losses(model, "sum", make(model.parameters()), lambda raw: on_the_device(remap(raw)), steps=STEPS)
    assert found == pytest.approx(expected, rel=0, abs=CUDA_TOLERANCE)
    assert calls.count("pool") == calls.count("add_gradients") > 0


def test_a_collection_that_moves_is_followed(calls: list[str]) -> None:
    collection = clustered("sum")
    features = features_of(1, "sum")
    expected = collection(features).values()
    assert not calls
    torch.testing.assert_close(collection.to("cuda")(features).values().cpu(), expected)
    assert calls == ["pool"]
    assert torch.equal(collection.to("cpu")(features).values(), expected)
