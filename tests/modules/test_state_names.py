"""The names of weights and stamps, held to those that PyTorch gives them."""

import pytest
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection

from torchrec_cce import (
    CCEEmbeddingBagCollection,
    CCEEmbeddingBagConfig,
    CCEEmbeddingCollection,
    CCEEmbeddingConfig,
)
from torchrec_cce.modules import state_names
from torchrec_cce.modules.collection import CCECollection


def collection(pooled: bool) -> CCECollection:
    sizes = {"num_embeddings": 100, "embedding_dim": 16, "num_rows": 10}
    if pooled:
        return CCEEmbeddingBagCollection(tables=[CCEEmbeddingBagConfig(name="t", feature_names=["f"], **sizes)])
    return CCEEmbeddingCollection(tables=[CCEEmbeddingConfig(name="t", feature_names=["f"], **sizes)])


@pytest.mark.parametrize("path", ["", "arch", "arch.remap"])
@pytest.mark.parametrize("pooled", [True, False])
def test_names_are_those_in_a_state_dict(path: str, pooled: bool) -> None:
    model = collection(pooled)
    for part in reversed(path.split(".") if path else []):
        model = nn.ModuleDict({part: model})  # type: ignore[assignment]
    names = list(model.state_dict())
    weight = state_names.pooled_weight("t") if pooled else state_names.sequence_weight("t", 4)
    assert state_names.joined(path, weight) in names
    keys = [state_names.in_checkpoint(name) for name in names]
    assert state_names.stamps_of(path) in keys
    assert [state_names.stamped_collection(key) for key in keys].count(None) == len(keys) - 1
    assert state_names.stamped_collection(state_names.stamps_of(path)) == path


@pytest.mark.parametrize("pooled", [True, False])
def test_a_weight_is_split_into_its_stock_module_and_table(pooled: bool) -> None:
    model = collection(pooled)
    stock, table = state_names.split_weight(model.weight_name("t"))
    assert table == "t"
    assert isinstance(model.get_submodule(stock), EmbeddingBagCollection if pooled else EmbeddingCollection)
