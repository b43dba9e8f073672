"""Tables whose pointers are stored in 4 bits are, but for the bytes, those of 8 bits: bit by bit, from start to end."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchrec import KeyedJaggedTensor
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_cce import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig, Registry, ResidentConfig
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.errors import ConfigError
from torchrec_cce.maps.pointer_format import CODES_AT_A_TIME, MinPointerBits
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.vocabulary import Vocabulary

N = 700


def collection(bits: MinPointerBits, **changes: Any) -> CCEEmbeddingBagCollection:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_embeddings": N, "embedding_dim": 30, "num_rows": 16, "num_columns": 5, **changes}
    table = CCEEmbeddingBagConfig(name="t", feature_names=["f"], min_pointer_bits=bits, **sizes)
    return CCEEmbeddingBagCollection(tables=[table])


def batch(num_ids: int = N) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(keys=["f"], values=torch.arange(num_ids), lengths=torch.ones(num_ids, dtype=torch.int32))


def train(one: CCEEmbeddingBagCollection, optimizer: torch.optim.Optimizer, steps: int = 2) -> torch.Tensor:
    target = torch.randn(N, 30, generator=torch.Generator().manual_seed(7))
    for _ in range(steps):
        optimizer.zero_grad()
        found = one(batch()).values()
        (found - target).square().sum().backward()
        optimizer.step()
    return found.detach()


def assert_same_codes(small: PointerMap, plain: PointerMap) -> None:
    assert (small.pointer_format.bits, plain.pointer_format.bits) == (4, 8)
    assert small.pointers.equals(plain.pointers)
    assert small.helper_hash.multipliers.tolist() == plain.helper_hash.multipliers.tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_rows": 2, "num_columns": 15},
        {"num_rows": 13, "num_columns": 30},
        {"use_helper": False, "num_rows": 9, "num_columns": 2},
        {"residents": ResidentConfig(fraction=0.3)},
        {"residents": ResidentConfig(fraction=0.3, dtype="int8"), "num_columns": 6},
    ],
)
def test_training_clustering_and_folding(changes: dict[str, Any]) -> None:
    both = [collection(bits, **changes) for bits in (4, 8)]
    optimizers = [RowWiseAdagrad(one.parameters(), lr=0.1) for one in both]
    for generation in range(3):
        if "residents" in changes:
            for one, optimizer in zip(both, optimizers, strict=True):
                one.admit(seed=3, optimizer=optimizer)
        found = [train(one, optimizer) for one, optimizer in zip(both, optimizers, strict=True)]
        assert torch.equal(*found)
        reports = [
            one.recluster(
                seed=generation, optimizer=optimizer, settings=ReclusterConfig(chunk_size=100 * generation + 50)
            )
            for one, optimizer in zip(both, optimizers, strict=True)
        ]
        small, plain = (one.pointer_map("t") for one in both)
        assert_same_codes(small, plain)
        assert small.nbytes == N * -(-both[0].cce_configs()[0].num_columns // 2)
        for name in ("entropies", "objective", "share_changed", "sample_errors"):
            assert getattr(reports[0]["t"], name) == getattr(reports[1]["t"], name)
    assert torch.equal(both[0](batch()).values(), both[1](batch()).values())


def test_a_table_of_many_parts() -> None:
    """Codes are encoded a part at a time; the sums over the parts are those over all."""
    n = CODES_AT_A_TIME + 3
    both = [collection(bits, num_embeddings=n, embedding_dim=6, num_columns=3, num_rows=4) for bits in (4, 8)]
    settings = ReclusterConfig(num_iterations=3, num_threads=2, helper_init="residual")
    frequencies = {"t": np.arange(n) % 5}
    reports = [one.recluster(seed=1, settings=settings, frequencies=frequencies)["t"] for one in both]
    assert_same_codes(*(one.pointer_map("t") for one in both))
    assert (reports[0].objective, reports[0].entropies) == (reports[1].objective, reports[1].entropies)
    assert torch.equal(both[0].ebc.embedding_bags["t"].weight, both[1].ebc.embedding_bags["t"].weight)


def test_one_column_and_more_rows_take_a_byte() -> None:
    for changes, bits in (({"num_columns": 1}, 8), ({"num_rows": 17}, 8), ({"num_rows": 257, "num_columns": 3}, 16)):
        one = collection(4, **changes)
        one.recluster(seed=0)
        assert one.pointer_map("t").pointer_format.bits == one.cce_configs()[0].pointer_bits == bits
    with pytest.raises(ConfigError, match="table 't': min_pointer_bits=16 is neither 4 nor 8"):
        collection(16)  # type: ignore[arg-type]


@pytest.mark.parametrize("keys", [False, True])
def test_published_opened_and_attached(tmp_path: Path, keys: bool) -> None:
    """A version of either width goes to a model that makes the other; what it looks up is the same."""
    vocabulary = Vocabulary.build(np.random.default_rng(0).permutation(10 * N)[: N - 9])
    both = [collection(bits) for bits in (4, 8)]
    for one in both:
        if keys:
            one.attach_pointer_map("t", one.pointer_map("t").with_vocabulary(vocabulary))
        one.recluster(seed=1)
    registry = Registry(tmp_path / "registry", cache=tmp_path / "cache")
    versions = [registry.publish(one.snapshot()).version for one in both]
    assert registry.verify() == []
    assert [registry.manifest(version).format for version in versions] == [3, 2]
    opened = [registry.open(version) for version in versions]
    sizes = [one.manifest.tables["t"].pointers.num_bytes for one in opened]  # type: ignore[union-attr]
    assert sizes[1] - sizes[0] == pytest.approx(2 * (N - 9 if keys else N), abs=256)
    for version, one in zip(opened, both, strict=True):
        assert version.tables["t"].pointer_map.digest == one.pointer_map("t").digest
    for one, other, version in ((both[0], both[1], opened[1]), (both[1], both[0], opened[0])):
        expected = other(batch()).values()
        version.attach(one)
        assert one.pointer_map("t").digest == version.tables["t"].pointer_map.digest
        assert torch.equal(one(batch()).values(), expected)
        if keys:
            grown = Vocabulary.build(np.concatenate([vocabulary.keys(), [-5, -6]]))
            one.attach_pointer_map("t", one.pointer_map("t").with_vocabulary(grown))
            assert torch.equal(one(batch()).values(), expected)
        one.recluster(seed=2)
    assert_same_codes(both[0].pointer_map("t"), both[1].pointer_map("t"))
