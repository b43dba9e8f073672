"""Remapped data written the plain way: whole tables, through the schemes that the modules use."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_cce import CCEEmbeddingBagCollection
from torchrec_cce.data.arrow import to_column
from torchrec_cce.data.remapped_format import (
    METADATA_KEY,
    HelperPolicy,
    Layout,
    RemappedFormat,
    pointer_arrays,
    remapped_feature,
)
from torchrec_cce.methods.cce import CCEScheme

SHA = "5" * 64


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
    """Replace the raw columns of all features of the collection's CCE tables; Parquet, or Arrow for `.arrow`.

    Args:
        columns: feature → raw column, where it is not of the feature's name.
    """
    new, features = raw, {}
    slots = [(table, feature) for table in collection.cce_configs() for feature in table.feature_names]
    for table, feature in slots:
        shared = sum(other == feature for _, other in slots) > 1
        column, pointer_map = (columns or {}).get(feature, feature), collection.pointer_map(table.name)
        one = remapped_feature(
            feature,
            table=table.name,
            column=column,
            map_digest=pointer_map.digest,
            num_columns=table.num_columns,
            num_rows=table.num_rows,
            layout=layout,
            helper=helper,
            shared=shared,
        )
        features[f"{feature}@{table.name}" if shared else feature] = one
        array = raw.column(column).combine_chunks()
        ids = to_column(array).values
        rows = np.empty((table.num_columns, len(ids), 2), np.int64)
        CCEScheme(pointer_map=pointer_map).rows_into(ids, rows)
        codes = (rows % table.num_rows).astype(one.dtype)
        for names, term in ((one.pointers, 0), (one.helpers, 1)):
            items = pointer_arrays(np.ascontiguousarray(codes[:, :, term].T), layout) if names else []
            for name, each in zip(names, items, strict=True):
                new = new.append_column(name, like(array, each))
    if helper != "keep-raw":
        new = new.drop_columns(list({one.column for one in features.values()}))
    document = RemappedFormat(
        version=version, manifest_sha256=SHA, layout=layout, helper=helper, features=features
    ).to_json()
    new = new.replace_schema_metadata({**(raw.schema.metadata or {}), METADATA_KEY: document})
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".arrow":
        with pa.ipc.new_file(path, new.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
            writer.write_table(new, max_chunksize=row_group_size)
    else:
        pq.write_table(new, path, row_group_size=row_group_size)
    return path


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
