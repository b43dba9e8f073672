"""The features that a remap replaces: those that are asked for, or those that the raw data have."""

from collections.abc import Mapping
from typing import Any

import pyarrow.parquet as pq

from torchrec_cce.data.remapped_format import (
    HelperPolicy,
    Layout,
    RemappedFormat,
    feature_key,
    remapped_feature,
)
from torchrec_cce.errors import ConfigError, DataFileError
from torchrec_cce.jobs.remap.input import InputFile, reading
from torchrec_cce.maps.registry import MapVersion
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.maps.store import open_store


def remapped_format(
    opened: MapVersion,
    folder: str,
    file: InputFile,
    features: Mapping[str, str] | None,
    layout: Layout,
    helper: HelperPolicy,
    options: Mapping[str, Any],
) -> RemappedFormat:
    """The format of a job's output.

    Args:
        opened: the version whose maps replace raw IDs.
        folder, file: a raw file, whose columns decide where `features` does not.
        features: feature → its raw column; None for all that have a column of their name.
        layout, helper: see `torchrec_cce.data.remapped_format`.
        options: of the object store, see `open_store`.

    Raises:
        ConfigError: a feature that the version does not have, or a helper policy that its maps do not allow.
        DataFileError: the file has no column of a feature's name, or cannot be read.
    """
    tables_of: dict[str, list[str]] = {}
    for table, snapshot in opened.tables.items():
        for feature in snapshot.feature_names:
            tables_of.setdefault(feature, []).append(table)
    if features is None:
        name = f"{folder}/{file.name}"
        with reading(name), open_store(folder, **options).open_file(file.name) as raw:
            columns = {*pq.read_schema(raw).names, *file.hive_keys()}
        features = {feature: feature for feature in tables_of if feature in columns}
        if not features:
            raise DataFileError(
                f"{name}: no column has the name of a feature of {opened.identity}: {', '.join(tables_of)}; name the "
                "column of each in `features`"
            )
    unknown = [feature for feature in features if feature not in tables_of]
    if unknown:
        raise ConfigError(
            f"features {unknown} are not among those of {opened.identity}, which are {', '.join(tables_of)}"
        )
    for table in sorted({table for feature in features for table in tables_of[feature]}):
        if helper == "keep-raw" and opened.tables[table].pointer_map.unseen == "first_row":
            raise ConfigError(
                f"helper={helper!r}: raw IDs do not tell which of them the map of table {table!r} knows, and by its "
                "policy unseen='first_row' the others have the first row's helper; take store or drop"
            )
    return RemappedFormat(
        version=opened.version,
        manifest_sha256=opened.entry.manifest_sha256,
        layout=layout,
        helper=helper,
        features={
            feature_key(feature, table, shared=len(tables_of[feature]) > 1): remapped_feature(
                feature,
                table=table,
                column=column,
                layout=layout,
                helper=helper,
                shared=len(tables_of[feature]) > 1,
                **_sizes(opened.tables[table]),
            )
            for feature, column in features.items()
            for table in tables_of[feature]
        },
    )


def check_hive_keys(folder: str, file: InputFile, remapped: RemappedFormat) -> None:
    """Raise DataFileError if the column of a feature is a key of the file's folders."""
    keys = file.hive_keys()
    for feature in remapped.features.values():
        if feature.column in keys:
            raise DataFileError(
                f"{folder}/{file.name}: {feature.column!r}, the column of feature {feature.feature!r}, is a key of its "
                "folders, which are not remapped; write it as a column, or leave the feature out of `features`"
            )


def _sizes(table: TableSnapshot) -> dict[str, Any]:
    known = table.pointer_map
    return {"map_digest": known.digest, "num_columns": known.num_columns, "num_rows": known.num_rows}
