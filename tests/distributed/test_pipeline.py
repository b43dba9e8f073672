"""Pipelined training gives the bits of unpipelined training, with a clustering in the middle."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torchrec import KeyedJaggedTensor
from torchrec.datasets.utils import Batch

from tests.support.pipelines import WAYS, Trained, assert_all_ways_were_taken, assert_same, in_every_way
from torchrec_cce import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from torchrec_cce.errors import MapMismatchError
from torchrec_cce.methods.residents import ResidentConfig
from torchrec_cce.sharding.pipeline import RowCollate


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two ranks"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Trained]]:
    return in_every_way(tmp_path_factory.mktemp("pipelines"), world_size=request.param)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "plain"])
def test_the_bits_of_unpipelined_training(way: str, trained: list[dict[str, Trained]]) -> None:
    assert_same(way, trained, tolerance=0)


def test_all_ways_were_taken(trained: list[dict[str, Trained]]) -> None:
    assert_all_ways_were_taken(trained)


def collection(residents: ResidentConfig | None = None) -> CCEEmbeddingBagCollection:
    table = CCEEmbeddingBagConfig(
        name="t", num_embeddings=100, embedding_dim=8, feature_names=["f"], num_rows=9, residents=residents
    )
    return CCEEmbeddingBagCollection(tables=[table])


def to_batch(ids: Sequence[int]) -> Batch:
    features = KeyedJaggedTensor(keys=["f"], values=torch.tensor(ids), lengths=torch.ones(len(ids), dtype=torch.int32))
    return Batch(torch.zeros(len(ids), 1), features, torch.zeros(len(ids)))


def test_a_collated_batch_is_rows_that_the_collection_takes_as_they_are() -> None:
    one = collection()
    one.recluster(seed=0)
    collate = RowCollate(one, to_batch)
    (batch,) = collate.batches([collate([3, 99])])
    assert batch.sparse_features.keys() == [f"f#t#{j}" for j in range(4)]
    assert torch.equal(one(batch.sparse_features).values(), one(to_batch([3, 99]).sparse_features).values())


def recluster(one: CCEEmbeddingBagCollection) -> None:
    one.recluster(seed=0)


def attach_another(one: CCEEmbeddingBagCollection) -> None:
    other = collection()
    other.recluster(seed=5)
    one.attach_pointer_map("t", other.pointer_map("t"))


@pytest.mark.parametrize("change", [recluster, attach_another])
def test_rows_of_another_map_are_refused(change: Callable[[CCEEmbeddingBagCollection], Any]) -> None:
    """A loader that reads ahead has remapped the next batch before the map changes."""
    one = collection()
    collate = RowCollate(one, to_batch)
    ahead = [collate([i, i + 1]) for i in range(3)]
    batches = collate.batches(ahead)
    next(batches)
    change(one)
    with pytest.raises(MapMismatchError, match="remapped a batch before the collection got another map"):
        next(batches)


def admit(one: CCEEmbeddingBagCollection) -> None:
    one.admit(seed=0)


def fold(one: CCEEmbeddingBagCollection) -> None:
    """The maps are put back, so that the phase alone is another."""
    before = one.pointer_map("t")
    one.recluster(seed=0)
    one.attach_pointer_map("t", before)


def fold_and_admit(one: CCEEmbeddingBagCollection) -> None:
    fold(one)
    admit(one)


def leave_residents_out(one: CCEEmbeddingBagCollection) -> None:
    one.remap.leaves_out_residents = True


@pytest.mark.parametrize(
    ("is_open", "change"), [(False, admit), (True, fold), (True, fold_and_admit), (True, leave_residents_out)]
)
def test_rows_of_another_phase_are_refused(is_open: bool, change: Callable[[CCEEmbeddingBagCollection], Any]) -> None:
    """Slots of residents are those of one phase."""
    one = collection(ResidentConfig(fraction=0.5))
    if is_open:
        admit(one)
    collate = RowCollate(one, to_batch)
    batches = collate.batches([collate([i, i + 1]) for i in range(3)])
    next(batches)
    change(one)
    with pytest.raises(MapMismatchError, match="before the collection got another map or other residents"):
        next(batches)
