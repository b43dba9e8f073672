"""Small tables for the modules, features for them, and the comparison with the plain reference."""

import numpy as np
import torch
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor

from tests.support import method_references as references
from torchrec_cce import (
    CCEEmbeddingBagCollection,
    CCEEmbeddingBagConfig,
)

METHOD_SHAPES = {"hashing_trick": (1, 1), "ce_sum": (1, 3), "ce_concat": (4, 1), "ce_hybrid": (2, 2)}


def cce(name: str = "t_user", features: tuple[str, ...] = ("user",), **changes: object) -> CCEEmbeddingBagConfig:
    arguments = {"num_embeddings": 1000, "embedding_dim": 16, "num_rows": 10, "num_columns": 4, **changes}
    return CCEEmbeddingBagConfig(name=name, feature_names=list(features), **arguments)


def full(name: str = "t_day", features: tuple[str, ...] = ("day",), **changes: object) -> EmbeddingBagConfig:
    arguments = {"num_embeddings": 7, "embedding_dim": 16, **changes}
    return EmbeddingBagConfig(name=name, feature_names=list(features), **arguments)


def random_features(
    keys: dict[str, int], batch_size: int, max_length: int, seed: int, *, weighted: bool = False
) -> KeyedJaggedTensor:
    """Bags of 0 to `max_length` IDs below `keys[feature]`."""
    rng = np.random.default_rng(seed)
    lengths = [rng.integers(0, max_length + 1, batch_size) for _ in keys]
    values = [rng.integers(0, n, size.sum()) for n, size in zip(keys.values(), lengths, strict=True)]
    flat = torch.from_numpy(np.concatenate(values))
    return KeyedJaggedTensor.from_lengths_sync(
        keys=list(keys),
        values=flat,
        lengths=torch.from_numpy(np.concatenate(lengths)).to(torch.int32),
        weights=torch.from_numpy(rng.random(len(flat), dtype=np.float32)) if weighted else None,
    )


def assert_equals_reference(collection: CCEEmbeddingBagCollection, features: KeyedJaggedTensor) -> None:
    weights = references.leaf_weights(collection)
    expected = references.forward(collection, weights, features)
    got = collection(features).values()
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    if not expected.requires_grad:  # all bags are empty
        return
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    (expected * cotangent).sum().backward()
    collection.zero_grad()
    (got * cotangent).sum().backward()
    for name, weight in weights.items():
        gradient = collection.ebc.embedding_bags[name].weight.grad
        expected_gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-5)
