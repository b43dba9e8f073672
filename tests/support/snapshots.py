"""Small tables to publish, each made from a seed."""

from typing import Any

import numpy as np

from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.maps.vocabulary import Vocabulary

NUM_COLUMNS, NUM_ROWS, DIM = 4, 50, 16


def pointer_map(seed: int = 0, *, num_ids: int = 1000, generation: int = 1, **changes: Any) -> PointerMap:
    """A map that was clustered `generation` times, to random pointers."""
    made = PointerMap.hashed(num_ids=num_ids, num_columns=NUM_COLUMNS, num_rows=NUM_ROWS, seed=7, **changes)
    rng = np.random.default_rng(seed)
    for _ in range(generation):
        pointers = rng.integers(0, NUM_ROWS, (num_ids, NUM_COLUMNS)).astype(np.uint8)
        made = made.clustered(pointers, made.next_helper_hash(seed))
    return made


def snapshot(seed: int = 0, *, of: PointerMap | None = None, **changes: Any) -> TableSnapshot:
    """A table with `num_rows=50` in 4 columns, `embedding_dim=16`."""
    of = pointer_map(seed) if of is None else of
    rng = np.random.default_rng(seed)
    values: dict[str, Any] = {
        "pointer_map": of,
        "num_embeddings": max(1, of.num_ids),
        "embedding_dim": DIM,
        "feature_names": ("user", "friend"),
        "pooling": "sum",
        "weights": rng.random((2 * NUM_COLUMNS * NUM_ROWS, DIM // NUM_COLUMNS), np.float32),
        "frequencies": rng.integers(0, 9, of.num_ids),
        "entropies": (3.5, 6.25, 6.5, 6.75),
        "objective": 0.125,
    }
    return TableSnapshot(**values | changes)


def tables(seed: int = 0) -> dict[str, TableSnapshot]:
    """One table of each kind: clustered, unclustered, and with a vocabulary."""
    keys = np.array([-(2**63), -1, 0, 5, 2**63 - 1, *range(10**12, 10**12 + 95)])
    keyed = pointer_map(seed, num_ids=len(keys), vocabulary=Vocabulary.build(keys), unseen="hash")
    return {
        "t_user": snapshot(seed),
        "t_new": snapshot(seed, of=pointer_map(generation=0), frequencies=None, entropies=(), objective=None),
        "t/ключ": snapshot(seed, of=keyed, pooling="mean"),
    }


def assert_same(first: TableSnapshot, second: TableSnapshot) -> None:
    assert first.pointer_map.digest == second.pointer_map.digest
    assert first.pointer_map.generation == second.pointer_map.generation
    for name in ("num_embeddings", "embedding_dim", "pooling", "entropies", "objective"):
        assert getattr(first, name) == getattr(second, name)
    assert tuple(first.feature_names) == tuple(second.feature_names)
    for name in ("weights", "frequencies"):
        mine, theirs = getattr(first, name), getattr(second, name)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            np.testing.assert_array_equal(mine, theirs)
    rows = np.arange(first.pointer_map.num_ids)
    np.testing.assert_array_equal(first.pointer_map.codes(rows), second.pointer_map.codes(rows))
