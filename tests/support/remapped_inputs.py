"""A collection, a raw log for it, and the log as the collection takes it: for tests of remapped data."""

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor

from torchrec_cce import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig, CompositionalEmbeddingBagConfig
from torchrec_cce.data.arrow import to_column
from torchrec_cce.data.rows import Rows, to_batch
from torchrec_cce.maps.pointer_format import MinPointerBits

NUM_IDS, NUM_ROWS = 50, 23
COLUMNS = {"user": "user_id", "tag": "tags"}


def collection(
    *,
    use_helper: bool = True,
    num_columns: int = 4,
    num_rows: int = 10,
    clusterings: int = 1,
    min_pointer_bits: MinPointerBits = 8,
) -> CCEEmbeddingBagCollection:
    """CCE tables of two features, one of them on two tables; a hashed and a full table."""
    torch.manual_seed(0)
    cce: dict[str, Any] = {"embedding_dim": 32, "num_rows": num_rows, "use_helper": use_helper}
    cce |= {"min_pointer_bits": min_pointer_bits}
    found = CCEEmbeddingBagCollection(
        tables=[
            CCEEmbeddingBagConfig(
                name="t_user", feature_names=["user", "friends"], num_embeddings=NUM_IDS, num_columns=num_columns, **cce
            ),
            EmbeddingBagConfig(name="day", feature_names=["day"], num_embeddings=7, embedding_dim=16),
            CCEEmbeddingBagConfig(name="again", feature_names=["friends"], num_embeddings=NUM_IDS, **cce),
            CompositionalEmbeddingBagConfig(
                name="tag", feature_names=["tag"], num_embeddings=100, embedding_dim=16, num_rows=9, num_terms=2
            ),
        ]
    )
    if num_rows > NUM_IDS:  # nothing to cluster: pointers of all sizes
        for table in found.cce_configs():
            start = found.pointer_map(table.name)
            pointers = np.random.default_rng(1).integers(0, num_rows, (NUM_IDS, table.num_columns))
            found.attach_pointer_map(
                table.name, start.clustered(table.pointer_format.encode(pointers), start.next_helper_hash(5))
            )
        return found
    for seed in range(clusterings):
        found.recluster(seed=seed)
    return found


def raw_log(seed: int = 0, num_rows: int = NUM_ROWS, *, ids: np.ndarray | None = None) -> pa.Table:
    """Nulls among scalars, null and empty lists, and a 32-bit column."""
    rng = np.random.default_rng(seed)
    universe = np.arange(NUM_IDS) if ids is None else ids

    def bags(values: np.ndarray) -> pa.Array:
        lists = [rng.choice(values, rng.integers(0, 4)).tolist() for _ in range(num_rows)]
        return pa.array([None if rng.random() < 0.2 else bag for bag in lists], pa.list_(pa.int64()))

    return pa.table(
        {
            "user_id": pa.array(rng.choice(universe, num_rows), mask=rng.random(num_rows) < 0.2),
            "label": rng.integers(0, 2, num_rows),
            "friends": bags(universe),
            "day": rng.integers(0, 7, num_rows).astype(np.int32),
            "price": rng.random(num_rows),
            "tags": bags(np.arange(100)),
        }
    )


def kjt(model: CCEEmbeddingBagCollection, raw: pa.Table) -> KeyedJaggedTensor:
    """The raw log as the model takes it."""
    features = list(dict.fromkeys(feature for _, feature in model.remap.table_features))
    columns = {f: to_column(raw.column(COLUMNS.get(f, f)).combine_chunks()) for f in features}
    rows = Rows(labels=np.zeros(len(raw), np.float32), dense=np.zeros((len(raw), 0), np.float32), ids=columns)
    return to_batch(rows, features).sparse_features
