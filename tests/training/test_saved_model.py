"""A model in a folder has its maps; a state dict whose map is nowhere is warned of."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.module_cases import cce, full, random_features
from torchrec_cce import (
    CCEEmbeddingBagCollection,
    CCEEmbeddingCollection,
    CCEEmbeddingConfig,
    Registry,
    load_model,
    save_model,
)
from torchrec_cce.errors import MapFileError, MapMismatchError
from torchrec_cce.methods.residents import ResidentConfig

IDS = random_features({"user": 1000, "day": 7}, 20, 3, seed=0)
RESIDENTS = ResidentConfig(fraction=0.5)


class Model(nn.Module):
    def __init__(self, num_embeddings: int = 1000) -> None:
        super().__init__()
        self.pooled = CCEEmbeddingBagCollection([cce(residents=RESIDENTS, num_embeddings=num_embeddings), full()])
        sizes = {"num_embeddings": 1000, "embedding_dim": 16, "num_rows": 10}
        self.unpooled = CCEEmbeddingCollection([CCEEmbeddingConfig(name="t", feature_names=["user"], **sizes)])

    def forward(self) -> torch.Tensor:
        return torch.cat([self.pooled(IDS).values().flatten(), self.unpooled(IDS)["user"].values().flatten()])


def clustered() -> Model:
    model = Model()
    model.unpooled.recluster(seed=1)
    model.pooled.recluster(seed=1)
    model.pooled.admit(seed=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1  # also of residents
    return model


def test_a_model_is_loaded_with_its_maps_and_residents(tmp_path: Path) -> None:
    model, other = clustered(), Model()
    save_model(model, tmp_path / "saved")
    load_model(other, tmp_path / "saved")
    assert torch.equal(other(), model())
    assert other.pooled.phase_is_open
    with pytest.raises(OSError, match="saved"):
        save_model(model, tmp_path / "saved")


def test_a_collection_by_itself(tmp_path: Path) -> None:
    one, other = clustered().unpooled, Model().unpooled
    save_model(one, tmp_path / "saved")
    load_model(other, tmp_path / "saved")
    assert torch.equal(other(IDS)["user"].values(), one(IDS)["user"].values())


def test_what_is_not_whole_or_of_another_model_changes_nothing(tmp_path: Path) -> None:
    model, other = clustered(), Model(num_embeddings=2000)
    save_model(model, tmp_path / "saved")
    before = other()[: IDS.stride()]
    with pytest.raises(MapMismatchError, match="1000 IDs"):
        load_model(other, tmp_path / "saved")
    (tmp_path / "saved" / "weights.pt").write_bytes(b"?")
    with pytest.raises(MapFileError, match=r"weights\.pt: missing or damaged"):
        load_model(Model(), tmp_path / "saved")
    assert torch.equal(other()[: IDS.stride()], before)


def told(model: nn.Module) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model.state_dict()
    return [str(each.message) for each in found]


def test_a_state_dict_whose_map_is_nowhere_is_warned_of_once() -> None:
    model = Model()
    assert told(model) == []
    model.unpooled.recluster(seed=7)
    (message,) = told(model)
    assert model.unpooled.pointer_map("t").identity in message
    assert "Registry.publish" in message
    assert "save_model" in message
    assert told(model) == []


def publish(model: Model, folder: Path) -> None:
    Registry(folder / "maps", cache=folder / "cache").publish(model.unpooled.snapshot())


def save(model: Model, folder: Path) -> None:
    save_model(model, folder / "saved")


@pytest.mark.parametrize("keep", [publish, save])
def test_a_map_that_is_kept_is_not_warned_of(keep: Callable[[Model, Path], None], tmp_path: Path) -> None:
    model = Model()
    model.unpooled.recluster(seed=8)
    keep(model, tmp_path)
    assert told(model) == []
