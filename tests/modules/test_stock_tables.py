"""Tables as TorchRec's own collections have them: by name, and in state dicts of models without ours."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
)
from torchrec.models.dlrm import DLRM
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection, fuse_embedding_optimizer

from tests.support.module_cases import cce, full, random_features
from torchrec_cce import (
    METHODS,
    CCEEmbeddingBagCollection,
    CCEEmbeddingCollection,
    CCEEmbeddingConfig,
    ResidentConfig,
    stock_state_dict,
    tables_under_cap,
)
from torchrec_cce.errors import ConfigError

FULL = [full(), full("t_hour", ("hour",), num_embeddings=24)]
FEATURES = random_features({"hour": 24, "day": 7}, 6, 2, seed=0)
SEQUENCES = [
    EmbeddingConfig(name=name, num_embeddings=n, embedding_dim=16, feature_names=[feature])
    for name, feature, n in (("t_day", "day", 7), ("t_hour", "hour", 24))
]


def dlrm(collection: nn.Module) -> DLRM:
    return DLRM(collection, dense_in_features=3, dense_arch_layer_sizes=[8, 16], over_arch_layer_sizes=[8, 1])


def models(kind: str) -> tuple[nn.Module, nn.Module]:
    """With a stock collection, and with ours of the same tables."""
    if kind == "pooled":
        return (
            dlrm(EmbeddingBagCollection(tables=copy.deepcopy(FULL))),
            dlrm(CCEEmbeddingBagCollection(tables=copy.deepcopy(FULL))),
        )
    return (
        nn.ModuleDict({"history": EmbeddingCollection(tables=copy.deepcopy(SEQUENCES))}),
        nn.ModuleDict({"history": CCEEmbeddingCollection(tables=copy.deepcopy(SEQUENCES))}),
    )


def assert_same_weights(ours: nn.Module, stock: nn.Module) -> None:
    state = stock_state_dict(ours)
    assert state.keys() == stock.state_dict().keys()
    for name, weight in stock.state_dict().items():
        assert torch.equal(state[name], weight), name


@pytest.mark.parametrize("kind", ["pooled", "sequences"])
def test_a_stock_checkpoint_and_back(kind: str) -> None:
    stock, ours = models(kind)
    ours.load_state_dict(stock.state_dict())
    assert_same_weights(ours, stock)
    for weight in ours.parameters():
        nn.init.normal_(weight)
    stock.load_state_dict(stock_state_dict(ours))
    assert_same_weights(ours, stock)
    ours.load_state_dict(ours.state_dict())  # its own names, as ever
    other = models(kind)[1]
    other.load_state_dict(stock_state_dict(ours))
    assert_same_weights(other, stock)


def test_a_distributed_checkpoint_of_a_stock_model(tmp_path: object) -> None:
    stock, ours = models("pooled")
    dcp.save(stock.state_dict(), checkpoint_id=str(tmp_path), no_dist=True)
    dcp.load(stock_state_dict(ours), checkpoint_id=str(tmp_path), no_dist=True)
    assert_same_weights(ours, stock)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_load_it_too(duplicate: object) -> None:
    stock, ours = models("pooled")
    other = duplicate(ours)
    before = copy.deepcopy(ours.state_dict())
    other.load_state_dict(stock.state_dict())
    assert_same_weights(other, stock)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, before[name]), "the copy's weights are its own"


def test_a_full_table_beside_a_compressed_one() -> None:
    stock = EmbeddingBagCollection(tables=[full(), full("t_user", ("user",), num_embeddings=1000)])
    ours = CCEEmbeddingBagCollection(tables=[full(), cce()])
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ConfigError, match=r"'t_user' is compressed \(CCE.*\[1000, 16\].*\[derive\].*strict=False"):
        ours.load_state_dict(stock.state_dict())
    for name, value in ours.state_dict().items():
        assert torch.equal(value, before[name]), "nothing may be overwritten before tables were compared"
    rest = stock.state_dict()
    del rest["embedding_bags.t_user.weight"]
    missing, unexpected = ours.load_state_dict(rest, strict=False)
    assert torch.equal(ours.embedding_bags["t_day"].weight, stock.embedding_bags["t_day"].weight)
    assert set(missing) == {"ebc.embedding_bags.t_user.weight", "remap._extra_state"}
    assert not unexpected
    with pytest.raises(ConfigError, match=r"'t_user' is compressed .*no full table"):
        stock_state_dict(ours)


@pytest.mark.parametrize("method", METHODS)
def test_tables_by_name(method: str) -> None:
    tables = tables_under_cap(
        [full("t_user", ("user",), num_embeddings=1000), full()], method=method, max_parameters=8200
    )
    collection = CCEEmbeddingBagCollection(tables=tables)
    keys = list(collection.state_dict())
    bags = collection.embedding_bags
    assert list(bags) == ["t_user", "t_day"]
    assert list(collection.state_dict()) == keys
    mine = {id(weight) for weight in collection.parameters()}
    theirs = {id(weight) for weight in bags.parameters()}
    assert theirs <= mine
    if method != "cce_residents":  # whose private rows are another table
        assert theirs == mine
    day = bags["t_day"]
    expected = day(torch.tensor([6, 0]), torch.tensor([0, 2]))
    features = KeyedJaggedTensor(["user", "day"], torch.tensor([6, 0]), lengths=torch.tensor([0, 2]))
    assert torch.equal(collection(features)["day"], expected)


def test_sequence_tables_by_name() -> None:
    sizes = {"num_embeddings": 1000, "embedding_dim": 16, "num_rows": 10}
    tables = [
        CCEEmbeddingConfig(name="a", feature_names=["user"], **sizes),
        *copy.deepcopy(SEQUENCES),
        CCEEmbeddingConfig(name="b", feature_names=["user"], residents=ResidentConfig(), **sizes),
    ]
    collection = CCEEmbeddingCollection(tables=tables)
    assert list(collection.embeddings) == ["a", "t_day", "t_hour", "b"]
    assert [tuple(table.weight.shape) for table in collection.embeddings.values()] == [
        (80, 4),
        (7, 16),
        (24, 16),
        (80, 4),
    ]


def test_weights_set_by_name_are_looked_up() -> None:
    collection = CCEEmbeddingBagCollection(tables=[cce(), full()])
    with torch.no_grad():
        for bag in collection.embedding_bags.values():
            bag.weight.fill_(1.0)
    features = random_features({"user": 1000, "day": 7}, 4, 3, seed=0)
    lengths = features["user"].lengths()[:, None]
    assert torch.equal(collection(features)["user"], 2.0 * lengths.expand(-1, 16))  # two codewords an ID


def test_no_stock_collection_by_its_type() -> None:
    """Were it one, TorchRec would put full tables in its place here, and the map would be lost."""
    collection = CCEEmbeddingBagCollection(tables=[cce(), full()])
    assert not isinstance(collection, EmbeddingBagCollection)
    fused = fuse_embedding_optimizer(
        collection, optimizer_type=torch.optim.SGD, optimizer_kwargs={"lr": 0.1}, device=torch.device("cpu")
    )
    assert fused is collection
    assert isinstance(fused.ebc, FusedEmbeddingBagCollection)
    assert fused.embedding_bags["t_user"].weight.shape == (80, 4)
    features = random_features({"user": 1000, "day": 7}, 4, 3, seed=0)
    assert fused(features).values().shape == (4, 32)
