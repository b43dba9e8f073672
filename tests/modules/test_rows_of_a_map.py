"""Remapped features say what their rows are of, and are refused under other maps; and what else the remap refuses."""

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from torchrec import KeyedJaggedTensor

from tests.support.module_cases import cce, full, random_features
from torchrec_cce import (
    CCEEmbeddingBagCollection,
    CCEEmbeddingCollection,
    CCEEmbeddingConfig,
    Registry,
)
from torchrec_cce.errors import ConfigError, MapMismatchError
from torchrec_cce.methods.residents import ResidentConfig

IDS = random_features({"user": 1000, "day": 7}, 20, 3, seed=0)


def collection(**changes: Any) -> CCEEmbeddingBagCollection:
    return CCEEmbeddingBagCollection(tables=[cce(**changes), full()])


def through_a_worker(rows: KeyedJaggedTensor) -> KeyedJaggedTensor:
    loader = DataLoader([rows], batch_size=None, num_workers=1, multiprocessing_context="fork")
    (received,) = loader
    return received


def rebuilt(rows: KeyedJaggedTensor) -> KeyedJaggedTensor:
    return KeyedJaggedTensor.from_jt_dict(rows.to_dict())


def joined(rows: KeyedJaggedTensor) -> KeyedJaggedTensor:
    return KeyedJaggedTensor.concat(rows.split([2, len(rows.keys()) - 2]))


Way = Callable[[KeyedJaggedTensor], KeyedJaggedTensor]

WAYS: Sequence[Way] = [
    lambda rows: rows,
    lambda rows: rows.to(torch.device("cpu")),
    lambda rows: rows.permute(list(range(len(rows.keys())))),
    lambda rows: pickle.loads(pickle.dumps(rows)),
    copy.deepcopy,
    through_a_worker,
    rebuilt,
    joined,
]


@pytest.mark.parametrize("way", WAYS, ids=["as is", "to", "permute", "pickle", "copy", "worker", "rebuilt", "joined"])
def test_rows_of_an_old_map_are_refused_however_they_came(
    way: Callable[[KeyedJaggedTensor], KeyedJaggedTensor],
) -> None:
    one = collection()
    before = way(one.remap(IDS))
    assert torch.equal(one(before).values(), one(IDS).values())
    one.recluster(seed=1)
    with pytest.raises(MapMismatchError, match=r"remapped under other maps .*Remap the raw IDs again"):
        one(before)
    after = way(one.remap(IDS))
    assert torch.equal(one(after).values(), one(IDS).values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory is pinned for a GPU")
def test_rows_of_an_old_map_are_refused_from_pinned_memory() -> None:
    one = collection()
    before = one.remap(IDS).pin_memory().to(torch.device("cuda"), non_blocking=True)
    before.record_stream(torch.cuda.current_stream())
    one.recluster(seed=1)
    with pytest.raises(MapMismatchError, match="remapped under other maps"):
        one(before)


def test_rows_of_sequences() -> None:
    table = CCEEmbeddingConfig(name="t", num_embeddings=1000, embedding_dim=16, feature_names=["user"], num_rows=10)
    one = CCEEmbeddingCollection(tables=[table])
    before = one.remap(IDS)
    one(before)
    one.recluster(seed=1)
    with pytest.raises(MapMismatchError, match="remapped under other maps"):
        one(before)


def test_rows_of_another_phase_of_residents() -> None:
    one = collection(residents=ResidentConfig(fraction=0.5))
    before = one.remap(IDS)
    one.admit(seed=0)
    with pytest.raises(MapMismatchError, match="or other residents"):
        one(before)
    during = one.remap(IDS)
    one(during)
    one.remap.leaves_out_residents = True
    with pytest.raises(MapMismatchError, match="or other residents"):
        one(during)


def test_rows_stay_good_under_the_same_map(tmp_path: Any) -> None:
    """Its version is learned, weights are trained and loaded, the model is copied: rows mean the same."""
    one = collection()
    one.recluster(seed=1)
    rows = one.remap(IDS)
    registry = Registry(tmp_path / "registry", cache=tmp_path / "cache")
    registry.publish(one.snapshot())
    registry.open().attach(one)
    one.load_state_dict(one.state_dict())
    assert torch.equal(one(rows).values(), one(IDS).values())
    assert torch.equal(copy.deepcopy(one)(rows).values(), one(IDS).values())


def test_keys_without_a_mark_pass() -> None:
    one = collection()
    rows = one.remap(IDS)
    plain = KeyedJaggedTensor(keys=one.remap.row_keys, values=rows.values(), lengths=rows.lengths())
    one.recluster(seed=1)
    one(plain)


def test_a_key_that_is_there_twice_is_refused() -> None:
    """As TorchRec's `validate_keyed_jagged_tensor` does."""
    doubled = KeyedJaggedTensor(
        keys=["user", "day", "user"], values=torch.tensor([1, 2, 3]), lengths=torch.ones(3).int()
    )
    with pytest.raises(ConfigError, match=r"the keys \['user'\] more than once"):
        collection()(doubled)


def test_a_compiled_graph_of_remapped_features_stays_whole_and_refuses_others() -> None:
    one = collection()
    compiled = torch.compile(one, backend="eager", fullgraph=True)
    before = one.remap(IDS)
    assert torch.equal(compiled(before).values(), one(IDS).values())
    one.recluster(seed=1)
    with pytest.raises(Exception, match="other maps"):
        compiled(before)
    assert torch.equal(compiled(one.remap(IDS)).values(), one(IDS).values())
