"""Click logs in Parquet: streamed as `Rows` with only the columns that are needed, and written from `Rows`."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_cce.data.arrow import BadCell, check_columns, from_column, to_column
from torchrec_cce.data.batches import global_batches
from torchrec_cce.data.files import PathLike, as_data_file_error, files_of
from torchrec_cce.data.record_batches import read_parts
from torchrec_cce.data.rows import Rows, log_transform
from torchrec_cce.errors import ConfigError
from torchrec_cce.files.atomic import atomic_path

_ROW_GROUP_ROWS = 1 << 17


def read_parquet(
    paths: PathLike | Sequence[PathLike],
    *,
    label: str,
    ids: Mapping[str, str],
    dense: Sequence[str] = (),
    dense_transform: Literal["none", "log1p"] = "none",
    skip_rows: int = 0,
    max_rows: int | None = None,
    chunk_rows: int = 65536,
) -> Iterator[Rows]:
    """Stream one or more Parquet files as one log.

    Args:
        paths: a file, a folder (its `*.parquet`, also in folders below, sorted by path), a pattern, or several of
            these, in this order; see `files_of`.
        label: a column of 0 and 1, integer, float or boolean.
        ids: feature → column of any integers (uint64 as two's complement), dictionary-encoded integers, or lists of
            them. A null and a null list are empty bags.
        dense: integer, float or boolean columns; null is 0.
        dense_transform: `"log1p"` is DLRM's `log(1 + max(x, 0))` for raw counts; `"none"` takes the values as they are.
        skip_rows: rows to pass over; whole files and row groups among them are not read.
        max_rows: rows to read after those; None = to the end.
        chunk_rows: the most rows in a chunk; the last one of a file may have fewer.

    Yields:
        `Rows`. A feature's `lengths` is None in a chunk where no bag is empty and the column holds no lists.

    Raises:
        DataFileError: while iterating. A file is missing or no Parquet file, a column is missing or of another type, or
            a cell is not allowed: a label other than 0 and 1, a dense value that is not finite, a null in a list.
        ConfigError: a negative `skip_rows` or `max_rows`, `chunk_rows < 1`, or an unknown `dense_transform`.
    """
    if dense_transform not in ("none", "log1p"):
        raise ConfigError(f'dense_transform={dense_transform!r} is not one of "none", "log1p"')

    def columns_of(path: Path, schema: pa.Schema) -> list[str]:
        check_columns(path, schema, [label, *dense], ids.values())
        return list(dict.fromkeys([label, *dense, *ids.values()]))

    parts = read_parts(parquet_files(paths), columns_of, skip_rows=skip_rows, max_rows=max_rows, chunk_rows=chunk_rows)
    for part in parts:
        rows = Rows(
            labels=part.labels(label),
            dense=part.dense(dense),
            ids={feature: part.column(name, to_column) for feature, name in ids.items()},
        )
        if dense_transform == "log1p":
            log_transform(rows.dense)
        yield rows


def num_rows(paths: PathLike | Sequence[PathLike]) -> int:
    """Rows of all files, from their footers alone.

    Raises:
        DataFileError: a file is missing or no Parquet file.
    """
    total = 0
    for path in parquet_files(paths):
        with as_data_file_error(path, "Parquet"):
            total += pq.read_metadata(path).num_rows
    return total


def write_parquet(
    path: PathLike,
    chunks: Iterable[Rows],
    *,
    dense: Sequence[str] = (),
    multi_hot: Collection[str] = (),
    label: str = "label",
) -> int:
    """Write rows to one Parquet file (zstd), which appears whole or not at all; returns how many there were.

    Args:
        path: the file; an older one is replaced.
        chunks: at least one row.
        dense: names of the D dense columns (float32).
        multi_hot: features to write as list<int64>; the others are int64, null for an empty bag.
        label: name of the label column (float32).

    Raises:
        ConfigError: there is no row, `dense` does not name each dense column, two columns have one name, or a feature
            that is not `multi_hot` has a bag of more than one ID.
    """
    total = 0
    writer: pq.ParquetWriter | None = None
    with atomic_path(Path(path)) as temporary, ExitStack() as opened:
        for rows in global_batches(chunks, _ROW_GROUP_ROWS):
            table = _to_table(rows, label, dense, multi_hot)
            writer = writer or opened.enter_context(pq.ParquetWriter(temporary, table.schema, compression="zstd"))
            writer.write_table(table)
            total += len(rows)
        if not total:
            raise ConfigError(f"{path}: no rows to write; without one the features are not known")
    return total


def parquet_files(paths: PathLike | Sequence[PathLike]) -> list[Path]:
    """The files that `paths` stands for: a folder is its `*.parquet`, also in folders below; see `files_of`.

    Raises:
        DataFileError: a path that is not there, a pattern that nothing matches, or a folder without such a file.
    """
    return files_of(paths, (".parquet",))


def _to_table(rows: Rows, label: str, dense: Sequence[str], multi_hot: Collection[str]) -> pa.Table:
    names = [label, *dense, *rows.ids]
    if len(dense) != rows.dense.shape[1]:
        raise ConfigError(f"dense={list(dense)} names {len(dense)} columns, the rows have {rows.dense.shape[1]}")
    unknown = sorted(set(multi_hot) - rows.ids.keys())
    if unknown or len(set(names)) < len(names):
        raise ConfigError(
            f"multi_hot names {unknown}, which are not features of the rows"
            if unknown
            else f"two columns have one name: {names}"
        )

    def convert(feature: str) -> pa.Array:
        try:
            return from_column(rows.ids[feature], multi_hot=feature in multi_hot)
        except BadCell as error:
            raise ConfigError(f"feature {feature!r} {error}") from None

    numbers = [rows.labels, *np.ascontiguousarray(rows.dense.T)]
    return pa.table([*map(pa.array, numbers), *map(convert, rows.ids)], names=names)
