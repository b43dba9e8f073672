"""Proof of remapped files: a sample of their rows against the raw files and the map, by another way than the job's."""

import random
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_cce.data.arrow import to_column
from torchrec_cce.data.remapped_format import RemappedFeature, RemappedFormat, codes_of, is_id_list
from torchrec_cce.errors import DataFileError
from torchrec_cce.jobs.remap.remapper import Remapper
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.store import Store

_GROUPS = 3
_ROWS = 1000


def check_file(source: Store, name: str, output: Store, output_name: str, remapper: Remapper, seed: int = 0) -> int:
    """Read rows of some row groups back, and compare them with what numpy makes of the raw rows.

    Args:
        source, name: the raw file.
        output, output_name: the remapped one, Parquet or Arrow IPC by the end of its name.
        seed: of the choice of row groups and rows.

    Returns:
        The rows that were compared: up to 1000 in each of up to 3 row groups.

    Raises:
        DataFileError: a row differs; names column, row and both values.
    """
    place = f"{output.url}/{output_name}"
    with ExitStack() as files:
        raw = pq.ParquetFile(files.enter_context(source.open_file(name)))
        new_file = files.enter_context(output.open_file(output_name))
        new = pa.ipc.open_file(new_file) if output_name.endswith(".arrow") else pq.ParquetFile(new_file)
        new_schema = new.schema if isinstance(new, pa.RecordBatchFileReader) else new.schema_arrow
        wanted = remapper.schema(raw.schema_arrow, name)
        if not new_schema.equals(wanted, check_metadata=False):
            raise DataFileError(f"{place}: its schema is {new_schema.names}, not {wanted.names}; remap it again")
        if RemappedFormat.of_schema(new_schema, place) != remapper.format:
            raise DataFileError(f"{place}: was remapped with another map, or otherwise; remap it again")
        counts = [raw.metadata.row_group(group).num_rows for group in range(raw.num_row_groups)]
        rng = random.Random(f"{seed}/{name}")
        checked = 0
        filled = [group for group, count in enumerate(counts) if count]
        for group in rng.sample(filled, min(_GROUPS, len(filled))):
            rows = sorted(rng.sample(range(counts[group]), min(_ROWS, counts[group])))
            raw_rows = raw.read_row_group(group, use_threads=False).take(rows)
            new_rows = _read_group(new, filled.index(group)).take(rows)
            first = sum(counts[:group])
            _compare(raw_rows, new_rows, remapper, place, [first + row for row in rows])
            checked += len(rows)
    return checked


def _read_group(new: Any, group: int) -> pa.Table:
    """A row group, or the record batch that it became."""
    if isinstance(new, pq.ParquetFile):
        return new.read_row_group(group, use_threads=False)
    return pa.Table.from_batches([new.get_batch(group)])


def _compare(raw: pa.Table, new: pa.Table, remapper: Remapper, place: str, rows: Sequence[int]) -> None:
    remapped = {one.column for one in remapper.format.features.values()}
    kept = [name for name in raw.schema.names if name in new.schema.names]
    for name in kept if remapper.format.helper == "keep-raw" else [name for name in kept if name not in remapped]:
        _same(raw.column(name), new.column(name), place, name, rows)
    for feature in remapper.format.features.values():
        array = raw.column(feature.column).combine_chunks()
        ids = to_column(array).values
        codebook, helper = expected_codes(remapper.maps[feature.table], ids)
        for columns, codes in ((feature.pointers, codebook), (feature.helpers, helper)):
            if columns:
                _compare_codes(array, [new.column(name) for name in columns], codes, feature, remapper, place, rows)


def _compare_codes(
    raw: pa.Array,
    columns: Sequence[pa.ChunkedArray],
    codes: npt.NDArray[np.int64],
    feature: RemappedFeature,
    remapper: Remapper,
    place: str,
    rows: Sequence[int],
) -> None:
    arrays = [column.combine_chunks() for column in columns]
    lengths = to_column(raw).dense_lengths()
    for array in arrays:
        _same(raw.is_null(), array.is_null(), place, feature.column, rows)
        if is_id_list(array.type):
            _same(pa.array(lengths), array.value_lengths().fill_null(0), place, feature.column, rows)
    values = [array.flatten() if is_id_list(array.type) else array.drop_null() for array in arrays]
    found = codes_of(values, feature, remapper.format.layout)
    wrong = np.flatnonzero((found != codes).any(axis=1))
    if len(wrong):
        at = int(wrong[0])
        row = rows[int(np.searchsorted(np.cumsum(lengths, dtype=np.int64), at, side="right"))]
        raise DataFileError(
            f"{place}: column {feature.pointers[0]!r}, row {row} (the first is 0) has the codes {found[at].tolist()}, "
            f"the map of table {feature.table!r} gives {codes[at].tolist()}; remap it again"
        )


def _same(raw: Any, new: Any, place: str, name: str, rows: Sequence[int]) -> None:
    if raw.equals(new):
        return
    pairs = list(zip(raw.to_pylist(), new.to_pylist(), strict=True))
    row = next((rows[at] for at, (one, other) in enumerate(pairs) if one != other and one == one), None)
    if row is not None:  # NaN is no difference
        raise DataFileError(f"{place}: column {name!r}, row {row} (the first is 0) is not as in the raw file")


def expected_codes(one: PointerMap, ids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Codebook and helper codes of raw `ids: [N] int64`, [N, c] each, by the map's policy, in plain numpy."""
    positions = one.positions(ids)
    unseen = positions < 0
    if one.unseen == "first_row":
        ids, positions = np.where(unseen, one.first_id, ids), np.where(unseen, 0, positions)
        unseen = np.zeros_like(unseen)
    codebook = one.codebook_hash.numpy(ids)
    if one.stored is not None:
        codebook[~unseen] = one.stored_view[positions[~unseen]]
    return codebook, one.helper_hash.numpy(ids)
