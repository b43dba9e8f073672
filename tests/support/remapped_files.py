"""Remapped data written the plain way, as whole tables and by the schemes of the modules; and a log to train on."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tests.support import runs
from torchrec_cce import CCEEmbeddingBagCollection, Registry, Vocabulary
from torchrec_cce.data.arrow import to_column
from torchrec_cce.data.remapped_format import (
    METADATA_KEY,
    HelperPolicy,
    Layout,
    RemappedFormat,
    format_of,
    pointer_arrays,
    remapped_feature,
)
from torchrec_cce.methods.cce import CCEScheme
from torchrec_cce.training.config import RunConfig

SHA = "5" * 64
NUM_ROWS = 1200
KEYS = np.random.default_rng(8).integers(-(2**63), 2**63 - 1, 900)
"""Users: arbitrary 64-bit IDs, of which the vocabulary knows the first 800."""
COLUMNS = {"item": "items", "seen": "seen_items"}
TABLES = {
    "t_item": {"num_embeddings": 1200, "features": ["item", "seen"], "pooling": "mean"},
    "t_user": {"num_embeddings": 1000, "features": ["user"]},
    "day": 7,
}


def write_remapped(
    path: Path,
    raw: pa.Table,
    collection: CCEEmbeddingBagCollection,
    *,
    layout: Layout = "words",
    helper: HelperPolicy = "store",
    columns: dict[str, str] | None = None,
    version: int = 1,
    row_group_size: int = 1000,
) -> Path:
    """Write `raw` with the fields of all CCE table features replaced: as Arrow if `path` ends so, else as Parquet.

    Args:
        columns: feature → raw column, where it is not of the feature's name.
    """
    new, features = raw, {}
    table_features = [(table, feature) for table in collection.cce_configs() for feature in table.feature_names]
    for table, feature in table_features:
        shared = sum(other == feature for _, other in table_features) > 1
        column, pointer_map = (columns or {}).get(feature, feature), collection.pointer_map(table.name)
        remapped = remapped_feature(
            feature,
            table=table.name,
            column=column,
            map_digest=pointer_map.digest,
            num_columns=table.num_columns,
            num_rows=table.num_rows,
            layout=layout,
            helper=helper,
            shared=shared,
            min_pointer_bits=pointer_map.min_pointer_bits,
        )
        features[f"{feature}@{table.name}" if shared else feature] = remapped
        array = raw.column(column).combine_chunks()
        ids = to_column(array).values
        rows = np.empty((table.num_columns, len(ids), 2), np.int64)
        CCEScheme(pointer_map=pointer_map).rows_into(ids, rows)
        codes = (rows % table.num_rows).astype(remapped.dtype)
        for names, term in ((remapped.pointers, 0), (remapped.helpers, 1)):
            of_ids = np.ascontiguousarray(codes[:, :, term].T)
            if remapped.pointer_dtype == "uint4":
                items = words_of_4_bits(of_ids, len(names))
            else:
                items = pointer_arrays(of_ids, layout) if names else []
            for name, each in zip(names, items, strict=True):
                new = new.append_column(name, like(array, each))
    if helper != "keep-raw":
        new = new.drop_columns(list({feature.column for feature in features.values()}))
    document = RemappedFormat(
        format=format_of(features),
        version=version,
        manifest_sha256=SHA,
        layout=layout,
        helper=helper,
        features=features,
    ).to_json()
    new = new.replace_schema_metadata({**(raw.schema.metadata or {}), METADATA_KEY: document})
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".arrow":
        with pa.ipc.new_file(path, new.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
            writer.write_table(new, max_chunksize=row_group_size)
    else:
        pq.write_table(new, path, row_group_size=row_group_size)
    return path


def words_of_4_bits(codes: np.ndarray, num_words: int) -> list[pa.Array]:
    """`codes: [N, c]`, 16 a word, by Python's integers."""
    whole = [sum(code << (4 * column) for column, code in enumerate(row)) for row in codes.tolist()]
    words = [np.array([each >> (64 * word) & (2**64 - 1) for each in whole], np.uint64) for word in range(num_words)]
    return [pa.array(word.view(np.int64)) for word in words]


def like(raw: pa.Array, items: pa.Array) -> pa.Array:
    """`items`, one for each ID of `raw`, in the lists and with the nulls of `raw`."""
    mask = raw.is_null()
    if pa.types.is_list(raw.type):
        lengths = [0 if bag is None else len(bag) for bag in raw.to_pylist()]
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        return pa.ListArray.from_arrays(offsets, items, mask=mask)
    valid = np.flatnonzero(~mask.to_numpy(zero_copy_only=False))
    positions = np.full(len(raw), -1)
    positions[valid] = np.arange(len(valid))
    return items.take(pa.array(positions, mask=positions < 0))


def write_raw_log(path: Path) -> pa.Table:
    """Write lists with empty and null bags, a field with nulls and 64-bit IDs, and a feature of a full table."""
    rng = np.random.default_rng(1)

    def bags() -> pa.Array:
        lists = [rng.integers(0, 1200, rng.integers(0, 5)).tolist() for _ in range(NUM_ROWS)]
        return pa.array([None if rng.random() < 0.1 else bag for bag in lists], pa.list_(pa.int64()))

    users = rng.integers(0, 900, NUM_ROWS)
    table = pa.table(
        {
            "label": (rng.random(NUM_ROWS) < 0.2 + 0.6 * (users % 7 < 3)).astype(np.int64),
            "age": rng.random(NUM_ROWS),
            "items": bags(),
            "user": pa.array(KEYS[users], mask=rng.random(NUM_ROWS) < 0.1),
            "seen_items": bags(),
            "day": rng.integers(0, 20, NUM_ROWS).astype(np.int8),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=500)
    return table


def remapped_config(data: Path, registry: Path, /, *, format: str = "parquet", **changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "data": {
            "format": format,
            "label": "label",
            "dense": ["age"],
            "columns": COLUMNS,
            "train": {"path": str(data), "max_rows": 901},
            "validation": {"path": str(data), "skip_rows": 901, "max_rows": 150},
            "test": {"path": str(data), "skip_rows": 1051},
        },
        "tables": TABLES,
        "embedding": {"max_parameters": runs.MAX_PARAMETERS},
        "model": {"bottom": [16], "top": [16]},
        "registry": {"url": str(registry), "start": "current"},
        "training": {"batch_size": 65, "evaluate_every": 4, "epochs": 2},
    }
    return runs.changed(values, changes)


class World:
    """A log, a registry with two versions, and the log remapped with the second of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.raw = folder / "raw.parquet"
        self.log = write_raw_log(self.raw)
        self.url = folder / "registry"
        torch.manual_seed(5)
        self.collection = CCEEmbeddingBagCollection(tables=remapped_config(self.raw, self.url).table_configs())
        start = self.collection.pointer_map("t_user")
        vocabulary = Vocabulary.build(KEYS[:800])
        self.collection.attach_pointer_map("t_user", start.with_vocabulary(vocabulary, unseen="hash"))
        self.registry = Registry(self.url, cache=folder / "cache")
        for seed in range(2):
            reports = self.collection.recluster(seed=seed)
            with torch.no_grad():  # as after training, so that no codeword of a helper is zero
                for parameter in self.collection.parameters():
                    parameter.add_(0.01 * torch.randn_like(parameter))
            self.registry.publish(self.collection.snapshot(reports))
        for name, table in self.registry.open(2).tables.items():
            self.collection.attach_pointer_map(name, table.pointer_map)

    def remapped(self, helper: HelperPolicy, **options: Any) -> Path:
        """The folder of the three files into which the log is remapped."""
        folder = self.folder / f"remapped-{helper}"
        for i, suffix in enumerate(("parquet", "arrow", "parquet")):
            path = folder / f"part-{i}.{suffix}"
            if not path.exists():
                part = self.log.slice(400 * i, 400)
                write_remapped(path, part, self.collection, helper=helper, columns=COLUMNS, version=2, **options)
        return folder
