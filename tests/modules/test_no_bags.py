"""A batch of no bags at all, and bags without IDs: embeddings of shape `[0, d]`, and zeros."""

import pytest
import torch
from torchrec import EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor, PoolingType

from tests.support.module_cases import assert_equals_reference, cce, full
from torchrec_cce import (
    METHODS,
    CCEEmbeddingBagCollection,
    CCEEmbeddingCollection,
    CCEEmbeddingConfig,
    CompressedEmbeddingBag,
    ResidentConfig,
    tables_under_cap,
)

_NONE = torch.empty(0, dtype=torch.int64)
_KEYS = ["user", "day"]
BATCHES = {
    "one size for all": {},
    "a size for each feature": {"stride_per_key_per_rank": [[0], [0]]},
    "repeated by indices": {
        "stride_per_key_per_rank": [[0], [0]],
        "inverse_indices": (_KEYS, torch.empty(2, 0, dtype=torch.int64)),
    },
}


def no_bags(batch: str, *, weighted: bool = False) -> KeyedJaggedTensor:
    weights = torch.empty(0) if weighted else None
    return KeyedJaggedTensor(keys=_KEYS, values=_NONE, lengths=_NONE, weights=weights, **BATCHES[batch])


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("residents", [None, "float32", "int8"])
@pytest.mark.parametrize("pooling", ["sum", "mean", "weighted"])
def test_pooled(pooling: str, residents: str | None, batch: str) -> None:
    kind = PoolingType.MEAN if pooling == "mean" else PoolingType.SUM
    rows = None if residents is None else ResidentConfig(dtype=residents)
    weighted = pooling == "weighted"
    collection = CCEEmbeddingBagCollection(
        tables=[cce(pooling=kind, residents=rows), full(pooling=kind)], is_weighted=weighted
    )
    if residents is not None:
        collection.admit(seed=0)
    for features in (no_bags(batch, weighted=weighted), collection.remap(no_bags(batch, weighted=weighted))):
        pooled = collection(features)
        assert pooled.values().shape == (0, 32)
        assert pooled.keys() == ["user", "day"]
    pooled.values().sum().backward()  # as a rank must that has no samples while others have some
    trained = [p for name, p in collection.named_parameters() if not name.startswith("codewords.")]
    assert all(parameter.grad is not None for parameter in trained)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("residents", [None, "float32", "int8"])
@pytest.mark.parametrize("need_indices", [False, True])
def test_sequences(need_indices: bool, residents: str | None, batch: str) -> None:
    if need_indices and batch == "repeated by indices":
        return  # refused, whatever is in it
    sizes = {"num_embeddings": 1000, "embedding_dim": 16}
    rows = None if residents is None else ResidentConfig(dtype=residents)
    collection = CCEEmbeddingCollection(
        tables=[
            CCEEmbeddingConfig(name="t_user", feature_names=["user"], num_rows=10, residents=rows, **sizes),
            EmbeddingConfig(name="t_day", feature_names=["day"], **sizes),
        ],
        need_indices=need_indices,
    )
    if residents is not None:
        collection.admit(seed=0)
    sequences = collection(no_bags(batch))
    assert list(sequences) == ["user", "day"]
    for sequence in sequences.values():
        assert sequence.values().shape == (0, 16)
        assert sequence.lengths().shape == (0,)
        assert (sequence.weights_or_none() is not None) == need_indices


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN])
def test_as_an_embedding_bag(pooling: PoolingType, method: str) -> None:
    table = EmbeddingBagConfig(name="t", num_embeddings=5000, embedding_dim=16, feature_names=["t"], pooling=pooling)
    bag = CompressedEmbeddingBag(tables_under_cap([table], method=method, max_parameters=81_000)[0])
    assert bag(_NONE, _NONE).shape == (0, 16)
    assert bag(torch.empty(0, 3, dtype=torch.int64)).shape == (0, 16)
    assert torch.equal(bag(torch.empty(3, 0, dtype=torch.int64)), torch.zeros(3, 16))
    assert torch.equal(bag(_NONE, torch.tensor([0, 0])), torch.zeros(2, 16))
    if pooling == PoolingType.SUM:
        assert bag(_NONE, _NONE, torch.empty(0)).shape == (0, 16)


def test_some_features_have_no_bags() -> None:
    collection = CCEEmbeddingBagCollection(tables=[cce(), full()])
    features = KeyedJaggedTensor(
        keys=_KEYS,
        values=torch.tensor([5, 999]),
        lengths=torch.tensor([0, 2, 0, 0, 0]),
        stride_per_key_per_rank=[[3], [2]],
        inverse_indices=(_KEYS, torch.tensor([[1, 0, 1], [0, 1, 0]])),
    )
    expected = KeyedJaggedTensor(
        keys=_KEYS, values=torch.tensor([5, 999, 5, 999]), lengths=torch.tensor([2, 0, 2, 0, 0, 0])
    )
    assert torch.equal(collection(features).values(), collection(expected).values())


def test_all_bags_are_empty() -> None:
    features = KeyedJaggedTensor(keys=_KEYS, values=_NONE, lengths=torch.zeros(6, dtype=torch.int64))
    collection = CCEEmbeddingBagCollection(tables=[cce(), full()])
    assert_equals_reference(collection, features)
    assert torch.equal(collection(features).values(), torch.zeros(3, 32))
