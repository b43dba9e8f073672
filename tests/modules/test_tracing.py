"""`torch.jit.trace`: of remapped features it is right, of raw IDs an error."""

import pytest
import torch
from torch import nn
from torchrec import KeyedJaggedTensor

from tests.support.module_cases import cce, full, random_features
from torchrec_cce import CCEEmbeddingBagCollection
from torchrec_cce.errors import ConfigError


class OfTensors(nn.Module):
    """A collection with tensors as inputs, which are all that can be traced."""

    def __init__(self, keys: list[str]) -> None:
        super().__init__()
        self.collection = CCEEmbeddingBagCollection(tables=[cce(), full()])
        self.keys = keys or self.collection.remap.row_keys

    def forward(self, values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = self.collection(KeyedJaggedTensor(self.keys, values, lengths=lengths)).values()
        return pooled


def ids(seed: int) -> KeyedJaggedTensor:
    return random_features({"user": 1000, "day": 7}, 20, 3, seed=seed)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_raw_ids_cannot_be_traced() -> None:
    features = ids(0)
    with pytest.raises(ConfigError, match=r"torch\.jit\.trace cannot follow the remap.*Remap first"):
        torch.jit.trace(OfTensors(["user", "day"]), (features.values(), features.lengths()))


@pytest.mark.filterwarnings("ignore")
def test_what_comes_after_the_remap_is_traced() -> None:
    model = OfTensors([])
    first, others = ids(0), ids(0)
    others.values()[:] = (others.values() + 1) % 7  # in bags of the same lengths, which a trace of TorchRec's is of
    rows, other_rows = model.collection.remap(first), model.collection.remap(others)
    traced = torch.jit.trace(model, (rows.values(), rows.lengths()))
    assert torch.equal(traced(other_rows.values(), other_rows.lengths()), model.collection(others).values())
