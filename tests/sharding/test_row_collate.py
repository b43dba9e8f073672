"""`RowCollate` with batches of any class."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.data import DataLoader
from torchrec import KeyedJaggedTensor
from torchrec.datasets.utils import Batch

from tests.support.module_cases import cce, full, random_features
from torchrec_cce import CCEEmbeddingBagCollection
from torchrec_cce.errors import ConfigError
from torchrec_cce.sharding import RowCollate

FEATURES = random_features({"day": 7, "user": 1000, "unused": 5}, 4, 3, seed=0)
OTHERS = random_features({"user": 1000}, 4, 3, seed=1)
DENSE = torch.rand(4, 2)


class Pair(NamedTuple):
    dense: torch.Tensor
    sparse: KeyedJaggedTensor


@dataclass(frozen=True, slots=True)
class Frozen:
    sparse: KeyedJaggedTensor
    dense: torch.Tensor
    rows: int = field(init=False, default=4)


@dataclass
class Outer:
    inner: Frozen
    names: list[str]


class Plain:
    def __init__(self, sparse: KeyedJaggedTensor, dense: torch.Tensor) -> None:
        self.sparse, self.dense, self.myself = sparse, dense, self

    def pin_memory(self) -> "Plain":
        return self


BATCHES = {
    "itself": (FEATURES, lambda b: b),
    "TorchRec's": (Batch(DENSE, FEATURES, torch.zeros(4)), lambda b: b.sparse_features),
    "tuple": ((DENSE, FEATURES, 3), lambda b: b[1]),
    "list": ([DENSE, FEATURES], lambda b: b[1]),
    "named tuple": (Pair(DENSE, FEATURES), lambda b: b.sparse),
    "dict": ({"x": DENSE, "ids": FEATURES}, lambda b: b["ids"]),
    "frozen, slots": (Frozen(FEATURES, DENSE), lambda b: b.sparse),
    "nested": (Outer(Frozen(FEATURES, DENSE), ["a"]), lambda b: b.inner.sparse),
    "nested in a dict": ({"parts": (DENSE, [FEATURES])}, lambda b: b["parts"][1][0]),
    "plain": (Plain(FEATURES, DENSE), lambda b: b.sparse),
}


@pytest.fixture
def collection() -> CCEEmbeddingBagCollection:
    made = CCEEmbeddingBagCollection(tables=[cce(), full()])
    made.recluster(seed=0)
    return made


@pytest.mark.parametrize("kind", BATCHES)
def test_rows_take_the_place_of_raw_ids(kind: str, collection: CCEEmbeddingBagCollection) -> None:
    batch, sparse = BATCHES[kind]
    expected = collection(FEATURES).values()
    collate = RowCollate(collection, lambda _: batch)
    (got,) = collate.batches(DataLoader([0], collate_fn=collate))
    assert type(got) is type(batch)
    assert sparse(batch) is FEATURES, "the caller's batch stays as it is"
    assert sparse(got).keys() == collection.remap(FEATURES).keys()
    assert torch.equal(collection(sparse(got)).values(), expected)


def test_what_else_is_in_the_batch_stays(collection: CCEEmbeddingBagCollection) -> None:
    batch = {"ids": FEATURES, "of another": OTHERS, "x": DENSE, "day": 3}
    got, _ = RowCollate(collection, lambda _: batch)(None)
    assert got["of another"] is OTHERS
    assert got["x"] is DENSE
    assert list(got) == list(batch)
    frozen, _ = RowCollate(collection, lambda _: Frozen(FEATURES, DENSE))(None)
    assert frozen.dense is DENSE
    assert frozen.rows == 4


@pytest.mark.parametrize("batch", [OTHERS, (OTHERS, DENSE), {"x": DENSE}, None])
def test_a_batch_without_the_features(batch: Any, collection: CCEEmbeddingBagCollection) -> None:
    with pytest.raises(ConfigError, match=rf"{type(batch).__name__}, has all features \['day', 'user'\]"):
        RowCollate(collection, lambda _: batch)(None)
