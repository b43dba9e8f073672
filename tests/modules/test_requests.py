"""Embeddings of a request that is no KeyedJaggedTensor."""

import numpy as np
import pytest
import torch
from torchrec import KeyedJaggedTensor

from tests.support.module_cases import cce, full, random_features
from torchrec_cce import CCEEmbeddingBagCollection
from torchrec_cce.errors import ConfigError, InvalidIDError, MapMismatchError


def collection(*, is_weighted: bool = False) -> CCEEmbeddingBagCollection:
    torch.manual_seed(0)
    return CCEEmbeddingBagCollection([cce(features=("user", "friend")), full()], is_weighted=is_weighted)


def request() -> KeyedJaggedTensor:
    """Features in another order than those of tables, and one of no table."""
    return random_features({"day": 7, "friend": 1000, "unused": 4, "user": 1000}, 5, 2, seed=0)


def look_up(tables: CCEEmbeddingBagCollection, features: KeyedJaggedTensor) -> torch.Tensor:
    return tables.look_up(features.keys(), features.values(), features.offsets().long())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_the_embeddings_are_those_of_forward(dtype: torch.dtype) -> None:
    tables, features = collection(), request()
    features = KeyedJaggedTensor(features.keys(), features.values().to(dtype), offsets=features.offsets())
    for _ in range(2):
        found = look_up(tables, features)
        assert not found.requires_grad
        assert torch.equal(found, tables(features).values())
        tables.recluster(seed=1)  # the map that was looked up by is not that of the next request
    no_bags = tables.look_up(features.keys(), features.values()[:0], torch.zeros(1, dtype=torch.int64))
    assert no_bags.shape == (0, found.shape[1])


def test_bad_ids_and_weights_of_another_map_are_refused_as_by_forward() -> None:
    tables, features = collection(), request()
    features.values()[-1] = 1000
    with pytest.raises(InvalidIDError, match="'user': raw ID 1000"):
        look_up(tables, features)
    before = {name: value.clone() for name, value in tables.state_dict().items()}
    tables.recluster(seed=1)
    for name, value in tables.state_dict().items():
        value.copy_(before[name])
    with pytest.raises(MapMismatchError):
        look_up(tables, request())


def test_what_cannot_be_looked_up_so_is_refused() -> None:
    features = request()
    keys, values, offsets = features.keys(), features.values(), features.offsets().long()
    hooked = collection()
    hooked.ebc.register_forward_hook(lambda *_: None)
    for tables, arguments in (
        (collection(), (["day", "user"], values, offsets)),
        (collection(), (keys, values.float(), offsets)),
        (collection(), (keys, values, offsets.int())),
        (collection(), (keys, values.to("meta"), offsets)),
        (collection(is_weighted=True), (keys, values, offsets)),
        (hooked, (keys, values, offsets)),
        (collection().double(), (keys, values, offsets)),
    ):
        with pytest.raises(ConfigError, match="without a KeyedJaggedTensor: that takes int64 or int32"):
            tables.look_up(*arguments)
    with pytest.raises(ConfigError, match="20 offsets are not those of bags of 4 features"):
        collection().look_up(keys, values, offsets[:-1])
    with pytest.raises(ConfigError, match="do not divide"):
        collection().look_up(keys, values[:-1], offsets)
    assert np.isfinite(collection().look_up(keys, values, offsets).numpy()).all()
