"""Weights say which maps they were trained with: by the names of tables, and also where they are loaded in place."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torchrec import EmbeddingBagConfig

from tests.support.module_cases import cce, random_features
from torchrec_cce import CCEEmbeddingBagCollection, CompositionalEmbeddingBagConfig, Registry
from torchrec_cce.errors import MapMismatchError
from torchrec_cce.modules.state_names import STAMPS

IDS = random_features({"user": 1000, "item": 50}, 20, 3, seed=0)


def user() -> EmbeddingBagConfig:
    return cce()


def item() -> EmbeddingBagConfig:
    return cce("t_item", ("item",), num_embeddings=50)


def collection(*tables: EmbeddingBagConfig, clusterings: int = 0) -> CCEEmbeddingBagCollection:
    made = CCEEmbeddingBagCollection(tables=list(tables or (user(), item())))
    for _ in range(clusterings):
        made.recluster(seed=3)
    return made


def attach_maps(source: CCEEmbeddingBagCollection, target: CCEEmbeddingBagCollection) -> None:
    for table in target.cce_tables():
        if table in source.cce_tables():
            target.attach_pointer_map(table, source.pointer_map(table))


# in place


def load_in_place(source: CCEEmbeddingBagCollection, target: CCEEmbeddingBagCollection, folder: Path) -> dict[str, Any]:
    dcp.save(source.state_dict(), checkpoint_id=folder)
    state: dict[str, Any] = target.state_dict()
    dcp.load(state, checkpoint_id=folder)
    return state


@pytest.mark.parametrize(
    "use",
    [
        lambda one: one(IDS),
        lambda one: one(one.remap(IDS)),
        lambda one: one.recluster(seed=0),
        lambda one: one.snapshot(),
        lambda one: copy.deepcopy(one)(IDS),
        lambda one: pickle.loads(pickle.dumps(one))(IDS),
    ],
    ids=["forward", "remap", "recluster", "snapshot", "copy", "pickle"],
)
def test_weights_of_another_map_that_were_loaded_in_place_are_of_no_use(
    use: Callable[[CCEEmbeddingBagCollection], Any], tmp_path: Path
) -> None:
    trained, other = collection(clusterings=1), collection()
    load_in_place(trained, other, tmp_path)
    with pytest.raises(MapMismatchError, match=r"loaded in place, were .* generation 1 .*, attached is .*generation 0"):
        use(other)


def test_the_right_maps_mend_it(tmp_path: Path) -> None:
    trained, other = collection(clusterings=1), collection()
    state = load_in_place(trained, other, tmp_path)
    with pytest.raises(MapMismatchError, match="attach the checkpoint's own map first"):
        other.load_state_dict(state)
    other.attach_pointer_map("t_item", trained.pointer_map("t_item"))
    with pytest.raises(MapMismatchError, match="'t_user'"):  # one of two is not enough
        other(IDS)
    attach_maps(trained, other)
    assert torch.equal(other(IDS).values(), trained(IDS).values())
    other.load_state_dict(state)
    assert torch.equal(other.state_dict()[STAMPS], trained.state_dict()[STAMPS])


def test_weights_of_the_same_maps_are_loaded_in_place_and_learn_the_version(tmp_path: Path) -> None:
    trained, other = collection(clusterings=1), collection()
    attach_maps(trained, other)
    registry = Registry(tmp_path / "registry", cache=tmp_path / "cache")
    registry.publish(trained.snapshot())
    registry.open().attach(trained)
    load_in_place(trained, other, tmp_path / "checkpoint")
    assert torch.equal(other(IDS).values(), trained(IDS).values())
    assert other.pointer_map("t_user").version == 1
    other.recluster(seed=4)
    other(IDS)


def test_a_state_dict_follows_a_clustering_as_its_weights_do() -> None:
    one = collection()
    state = one.state_dict()
    one.recluster(seed=1)
    fresh = collection()
    attach_maps(one, fresh)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(IDS).values(), one(IDS).values())


# by name


def checkpointed(one: CCEEmbeddingBagCollection) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in one.state_dict().items()}


@pytest.mark.parametrize("in_place", [False, True])
def test_tables_in_another_order(in_place: bool, tmp_path: Path) -> None:
    trained, other = collection(user(), item(), clusterings=1), collection(item(), user())
    attach_maps(trained, other)
    if in_place:
        load_in_place(trained, other, tmp_path)
    else:
        other.load_state_dict(checkpointed(trained))
    for feature in ("user", "item"):
        assert torch.equal(other(IDS)[feature], trained(IDS)[feature])


def test_a_table_of_another_order_is_compared_by_name(tmp_path: Path) -> None:
    trained, other = collection(user(), item(), clusterings=1), collection(item(), user())
    other.attach_pointer_map("t_item", trained.pointer_map("t_item"))
    with pytest.raises(MapMismatchError, match="table 't_user': the checkpoint was"):
        other.load_state_dict(checkpointed(trained))
    load_in_place(trained, other, tmp_path)
    other.attach_pointer_map("t_item", trained.pointer_map("t_item"))  # keeps what was loaded for the other
    with pytest.raises(MapMismatchError, match="table 't_user': the weights, which"):
        other(IDS)


def test_a_table_more_or_less() -> None:
    both, one = collection(clusterings=1), collection(user())
    attach_maps(both, one)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*t_item"):
        one.load_state_dict(checkpointed(both))
    one.load_state_dict(checkpointed(both), strict=False)
    assert torch.equal(one(IDS)["user"], both(IDS)["user"])
    more = collection(item(), user())
    attach_maps(one, more)
    kept = checkpointed(more)[more.weight_name("t_item")]
    with pytest.raises(RuntimeError, match=r"Missing key.*t_item"):
        more.load_state_dict(checkpointed(one))
    more.load_state_dict(checkpointed(one), strict=False)
    assert torch.equal(more(IDS)["user"], both(IDS)["user"])
    assert torch.equal(more.state_dict()[more.weight_name("t_item")], kept)


@pytest.mark.parametrize("strict", [True, False])
def test_weights_without_the_stamp_of_a_map_are_refused(strict: bool) -> None:
    hashed = CompositionalEmbeddingBagConfig(
        name="t_item",
        num_embeddings=50,
        embedding_dim=16,
        feature_names=["item"],
        num_rows=20,
        num_columns=4,
        num_terms=1,
    )
    state = checkpointed(collection(user(), hashed))
    one = collection()
    assert state[one.weight_name("t_item")].shape == one.state_dict()[one.weight_name("t_item")].shape
    with pytest.raises(MapMismatchError, match="'t_item': the checkpoint has its weights, but no stamp"):
        one.load_state_dict(state, strict=strict)


def test_stamps_of_before_they_had_names_are_those_of_the_tables_in_their_order() -> None:
    trained, other, one = collection(clusterings=1), collection(), collection(user())
    old = checkpointed(trained)
    old[STAMPS][:, 2:] &= 0xFF
    with pytest.raises(MapMismatchError, match="table 't_user': the checkpoint was"):
        other.load_state_dict(old)
    attach_maps(trained, other)
    other.load_state_dict(old)
    assert torch.equal(other(IDS).values(), trained(IDS).values())
    with pytest.raises(MapMismatchError, match="has maps of 2 CCE tables, the module has 1"):
        one.load_state_dict(old, strict=False)
