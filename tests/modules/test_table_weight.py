"""Tables that something else has taken over: quantized ones serve on, and say what they cannot do; so do FSDP's."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchrec import EmbeddingBagCollection, KeyedJaggedTensor, PoolingType
from torchrec.inference.modules import quantize_embeddings, quantize_inference_model
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantEmbeddingBagCollection

from tests.support.module_cases import cce, full, random_features
from torchrec_cce import CCEEmbeddingBagCollection, Registry, ResidentConfig, tables_under_cap
from torchrec_cce.errors import ConfigError

FEATURES = random_features({"user": 1000, "day": 7}, 4, 3, seed=0)


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """Of which this process is the first; the other does nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.usefixtures("two_ranks")
def test_sharded_by_fsdp(gathered: bool, tmp_path: Path) -> None:
    whole = CCEEmbeddingBagCollection(tables=[cce(), full()])
    registry = Registry(tmp_path)
    registry.publish(whole.snapshot())
    model = nn.Sequential(copy.deepcopy(whole))
    fully_shard(model)
    if gathered:
        model(FEATURES)  # the root keeps what it gathered until the backward pass; writing there would be lost
    collection = model[0]
    before = collection.pointer_map("t_user")
    for attempt in (
        lambda: collection.recluster(seed=0),
        collection.snapshot,
        lambda: registry.open().attach(collection),
    ):
        with pytest.raises(ConfigError, match=r"t_user.* is sharded by PyTorch .*ignored_params"):
            attempt()
    assert collection.pointer_map("t_user") is before


@pytest.mark.usefixtures("two_ranks")
def test_left_out_of_fsdp() -> None:
    collection = CCEEmbeddingBagCollection(tables=[cce(), full()])
    other = copy.deepcopy(collection)
    model = nn.Sequential(collection, nn.Linear(32, 1))
    fully_shard(model, ignored_params=set(collection.parameters()))
    collection.recluster(seed=0)
    other.recluster(seed=0)
    assert torch.equal(collection(FEATURES).values(), other(FEATURES).values())


@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
@pytest.mark.parametrize("kind", ["cce", "float32", "int8", "count_sketch", "dhe"])
def test_quantized(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    users = full("t_user", ("user",), num_embeddings=1000)
    if kind in ("count_sketch", "dhe"):
        (table,) = tables_under_cap([users], method=kind, max_parameters=8200)
    else:
        table = cce(residents=None if kind == "cce" else ResidentConfig(dtype=kind))
    collection = CCEEmbeddingBagCollection(tables=[table, full()])
    if kind == "cce":
        collection.recluster(seed=0)
    elif kind in ("float32", "int8"):
        collection.admit(seed=0)
    expected = collection(FEATURES).values()
    quantized = quantize_embeddings(copy.deepcopy(collection), dtype=dtype, inplace=True)
    assert isinstance(quantized.ebc, QuantEmbeddingBagCollection)
    torch.testing.assert_close(quantized(FEATURES).values(), expected, atol=5e-3, rtol=0)
    assert quantized.device.type == "cpu"
    assert list(quantized.embedding_bags) == ["t_user", "t_day"]
    none = torch.empty(0, dtype=torch.int64)
    assert quantized(KeyedJaggedTensor(["user", "day"], none, lengths=none)).values().shape == (0, 32)


def test_kernels_of_quantized_tables_are_found_where_those_of_a_stock_collection_are() -> None:
    tables = [full(), full("t_user", ("user",), num_embeddings=1000, pooling=PoolingType.MEAN)]
    stock = nn.Sequential(EmbeddingBagCollection(tables=tables))
    found = nn.Sequential(CCEEmbeddingBagCollection(tables=[*tables, cce("t_codes", residents=ResidentConfig())]))
    assert not hasattr(found[0], "tbes")
    quantize_inference_model(stock)
    quantize_inference_model(found)
    assert len(stock[0].tbes) == 2
    assert len(found[0].tbes) == 2 + 2  # of codewords and of residents, which are collections of their own


def test_quantized_tables_are_neither_read_nor_written(tmp_path: Path) -> None:
    collection = CCEEmbeddingBagCollection(tables=[cce(), full()])
    registry = Registry(tmp_path)
    registry.publish(collection.snapshot())
    quantized = quantize_embeddings(collection, dtype=torch.qint8, inplace=True)
    before, expected = quantized.pointer_map("t_user"), quantized(FEATURES).values()
    for attempt in (
        lambda: registry.open().attach(quantized),
        lambda: quantized.recluster(seed=0),
        quantized.snapshot,
        quantized.reset_parameters,
    ):
        with pytest.raises(ConfigError, match=r"t_user.* is quantized, .*quantize that anew"):
            attempt()
    assert quantized.pointer_map("t_user") is before
    assert torch.equal(quantized(FEATURES).values(), expected)
