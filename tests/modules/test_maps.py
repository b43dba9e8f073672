"""Maps in the collection: arbitrary raw IDs, unseen ones, publishing and attaching."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec import KeyedJaggedTensor

from tests.support.module_cases import assert_equals_reference, cce, full, random_features
from torchrec_cce import CCEEmbeddingBagCollection, PointerMap, Registry, Vocabulary
from torchrec_cce.errors import ConfigError, InvalidIDError, MapMismatchError
from torchrec_cce.maps.pointer_map import Unseen

INT64 = st.integers(-(2**63), 2**63 - 1)


def features(user: list[int], day: int = 3) -> KeyedJaggedTensor:
    """Each user in a bag of its own."""
    n = len(user)
    values = torch.tensor([*user, *[day] * n])
    return KeyedJaggedTensor.from_lengths_sync(keys=["user", "day"], values=values, lengths=torch.ones(2 * n).int())


@given(
    keys=st.lists(INT64, min_size=1, max_size=40, unique=True),
    unseen_ids=st.lists(INT64, max_size=5),
    unseen=st.sampled_from(["hash", "first_row"]),
    clusterings=st.integers(0, 2),
    num_rows=st.sampled_from([3, 300]),
)
def test_arbitrary_ids_equal_the_plain_reference(
    keys: list[int], unseen_ids: list[int], unseen: Unseen, clusterings: int, num_rows: int
) -> None:
    collection = CCEEmbeddingBagCollection(tables=[cce(num_rows=num_rows), full()])
    start = collection.pointer_map("t_user").with_vocabulary(Vocabulary.build(np.array(keys)), unseen=unseen)
    collection.attach_pointer_map("t_user", start)
    for _ in range(clusterings):
        collection.recluster(seed=0)
    assert collection.pointer_map("t_user").num_ids == len(keys)
    assert_equals_reference(collection, features([*keys, *unseen_ids, keys[0]]))
    assert collection.unseen_ids() == {"t_user": sum(raw_id not in keys for raw_id in unseen_ids)}


def test_clustering_of_arbitrary_ids_is_that_of_their_rows() -> None:
    """A vocabulary that happens to number IDs 0 … n − 1 changes nothing at all."""
    dense, keyed = (CCEEmbeddingBagCollection(tables=[cce(num_rows=300)]) for _ in range(2))
    keyed.load_state_dict(dense.state_dict())
    vocabulary = Vocabulary.build(np.arange(1000))
    keyed.attach_pointer_map("t_user", keyed.pointer_map("t_user").with_vocabulary(vocabulary))
    for collection in (dense, keyed):
        collection.recluster(seed=3)
        collection.recluster(seed=3)
    ids = random_features({"user": 1000}, 50, 3, seed=0)
    assert torch.equal(dense(ids).values(), keyed(ids).values())
    assert dense.pointer_map("t_user").stored == keyed.pointer_map("t_user").stored


def with_policy(unseen: Unseen, *, keys: list[int] | None, clusterings: int = 1) -> CCEEmbeddingBagCollection:
    collection = CCEEmbeddingBagCollection(tables=[cce(), full()])
    one = collection.pointer_map("t_user")
    if keys is None:
        one = replace(one, unseen=unseen)
    else:
        one = one.with_vocabulary(Vocabulary.build(np.array(keys)), unseen=unseen)
    collection.attach_pointer_map("t_user", one)
    for _ in range(clusterings):
        collection.recluster(seed=0)
    return collection


@pytest.mark.parametrize("clusterings", [0, 1])
def test_unseen_ids_are_an_error(clusterings: int) -> None:
    keyed = with_policy("error", keys=[5, -9], clusterings=clusterings)
    keyed(features([5, -9]))
    with pytest.raises(InvalidIDError, match=r"raw ID 6 \(position 1 of its 3 values\) is not among the 2 of the voc"):
        keyed(features([5, 6, 7]))
    dense = with_policy("error", keys=None, clusterings=clusterings)
    with pytest.raises(InvalidIDError, match=r"raw ID 1000 \(position 0 of its 1 values\) is not in 0\.\.999"):
        dense(features([1000]))


@pytest.mark.parametrize("clusterings", [0, 1])
@pytest.mark.parametrize("keys", [None, [5, *range(-900, -100)]])
def test_unseen_ids_get_hashed_words_and_are_counted(keys: list[int] | None, clusterings: int) -> None:
    collection = with_policy("hash", keys=keys, clusterings=clusterings)
    assert collection.unseen_ids() == {"t_user": 0}
    stranger = collection(features([5, -77, 5, 2**60, -77]))
    assert collection.unseen_ids() == {"t_user": 3}
    assert torch.equal(stranger["user"][1], stranger["user"][4])
    assert not torch.equal(stranger["user"][1], stranger["user"][3])
    # What CE would do: the words of an unclustered map with the same hash functions.
    clustered = collection.pointer_map("t_user")
    plain_hash = replace(clustered, stored=None, vocabulary=None, num_ids=1000)
    collection.attach_pointer_map("t_user", replace(plain_hash, unseen="hash"))
    assert torch.equal(collection(features([-77]))["user"][0], stranger["user"][1])
    assert collection.unseen_ids() == {"t_user": 1}, "counted anew with the map"


@pytest.mark.parametrize("clusterings", [0, 1])
@pytest.mark.parametrize("keys", [None, [5, -9]])
def test_unseen_ids_get_the_first_row(keys: list[int] | None, clusterings: int) -> None:
    collection = with_policy("first_row", keys=keys, clusterings=clusterings)
    first = 0 if keys is None else 5
    found = collection(features([first, -77]))["user"]
    assert torch.equal(found[0], found[1])
    assert collection.unseen_ids() == {"t_user": 1}


def test_a_vocabulary_may_be_smaller_than_its_table_but_not_larger() -> None:
    collection = CCEEmbeddingBagCollection(tables=[cce(num_embeddings=3)])
    one = collection.pointer_map("t_user")
    collection.attach_pointer_map("t_user", one.with_vocabulary(Vocabulary.build(np.array([7, 8]))))
    with pytest.raises(
        MapMismatchError, match=r"has 3 IDs, 4 columns, 10 rows; the map, not published, .* is of 4 IDs"
    ):
        collection.attach_pointer_map("t_user", one.with_vocabulary(Vocabulary.build(np.arange(4))))


# publishing and attaching


def two() -> list[CCEEmbeddingBagCollection]:
    tables = [cce(), cce("t_item", ("item",), num_embeddings=50, embedding_dim=8), full()]
    return [CCEEmbeddingBagCollection(tables=tables) for _ in range(2)]


def everything(seed: int = 0) -> KeyedJaggedTensor:
    return random_features({"user": 1000, "item": 50, "day": 7}, 20, 3, seed=seed)


def test_published_and_attached_computes_the_same(tmp_path: Path) -> None:
    trained, other = two()
    reports = trained.recluster(seed=0)
    registry = Registry(tmp_path / "registry", cache=tmp_path / "cache")
    counts = np.arange(1000)
    entry = registry.publish(trained.snapshot(reports, frequencies={"t_user": counts}))
    opened = registry.open()
    manifest = opened.manifest.tables["t_user"]
    assert manifest.entropies == reports["t_user"].entropies
    assert manifest.objective == reports["t_user"].objective
    np.testing.assert_array_equal(opened.tables["t_user"].frequencies, counts)

    other.load_state_dict(
        {**other.state_dict(), "ebc.embedding_bags.t_day.weight": trained.ebc.embedding_bags["t_day"].weight}
    )
    opened.attach(other)
    assert torch.equal(other(everything()).values(), trained(everything()).values())
    assert other.pointer_map("t_user").version == entry.version == 1
    assert other.pointer_map("t_user").identity.startswith("version 1, generation 1 (digest ")
    with torch.no_grad():
        other.ebc.embedding_bags["t_user"].weight.zero_()
    assert opened.tables["t_user"].weights is not None
    assert opened.tables["t_user"].weights.any(), "the module trains a copy"


def test_weights_and_map_of_different_versions_do_not_load(tmp_path: Path) -> None:
    """Both identities are in the message, with the version of the one that was published."""
    trained, other = two()
    registry = Registry(tmp_path / "registry", cache=tmp_path / "cache")
    for _ in range(2):
        trained.recluster(seed=0)
        registry.publish(trained.snapshot())
    registry.open(2).attach(trained)
    checkpoint = trained.state_dict()
    registry.open(1).attach(other)
    theirs, ours = trained.pointer_map("t_user"), other.pointer_map("t_user")
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(MapMismatchError) as mismatch:
        other.load_state_dict(checkpoint)
    assert f"trained with the map version 2, generation 2 (digest {theirs.digest[:12]})" in str(mismatch.value)
    assert f"attached is version 1, generation 1 (digest {ours.digest[:12]})" in str(mismatch.value)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    registry.open(2).attach(other)
    other.load_state_dict(checkpoint)
    assert torch.equal(other(everything()).values(), trained(everything()).values())


def test_a_version_of_another_model_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    trained, other = two()
    trained.recluster(seed=0)
    registry = Registry(tmp_path / "registry", cache=tmp_path / "cache")
    tables = trained.snapshot()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    wider = CCEEmbeddingBagCollection(tables=[cce(), cce("t_item", ("item",), num_embeddings=50, embedding_dim=16)])
    registry.publish({"t_user": tables["t_user"]})
    registry.publish({**tables, "t_item": wider.snapshot()["t_item"]})
    larger = CCEEmbeddingBagCollection(tables=[cce(), cce("t_item", ("item",), num_embeddings=51, embedding_dim=8)])
    registry.publish({**tables, "t_item": larger.snapshot()["t_item"]})
    for version, message in (
        (1, r"the maps are of tables \['t_user'\], the module has \['t_item', 't_user'\]"),
        (2, r"'t_item' has embedding_dim=8; the map, version 2, .* comes with codewords for 16"),
        (3, r"'t_item' has 50 IDs, .* the map, version 3, .* is of 51 IDs"),
    ):
        with pytest.raises(MapMismatchError, match=message):
            registry.open(version).attach(other)
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
        assert other.pointer_map("t_user").generation == 0


def test_a_snapshot_is_a_copy() -> None:
    trained, _ = two()
    tables = trained.snapshot()
    weights = tables["t_user"].weights
    assert weights is not None
    expected = weights.copy()
    with torch.no_grad():
        trained.ebc.embedding_bags["t_user"].weight.zero_()
    np.testing.assert_array_equal(weights, expected)
    assert set(tables) == {"t_user", "t_item"}


def test_tables_that_are_not_there_yet() -> None:
    collection = CCEEmbeddingBagCollection(tables=[cce()], device=torch.device("meta"))
    with pytest.raises(ConfigError, match="meta device"):
        collection.snapshot()
    assert isinstance(collection.pointer_map("t_user"), PointerMap)
