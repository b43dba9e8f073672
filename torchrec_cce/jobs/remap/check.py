"""Proof of a remapped file: a sample of its rows against the raw file and the map, by another way than the job's."""

import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_cce.data.arrow import is_list, to_column
from torchrec_cce.data.remapped_format import Layout, RemappedFeature, RemappedFormat, codes_of, is_id_list
from torchrec_cce.data.rows import Column
from torchrec_cce.errors import DataFileError
from torchrec_cce.jobs.remap.input import reading
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
        DataFileError: a row differs; names column, row and both values. Or the file cannot be read.
    """
    place = f"{output.url}/{output_name}"
    with reading(place, "what it was written as"), ExitStack() as files:
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
        firsts = [0, *accumulate(counts)]
        rng = random.Random(f"{seed}/{name}")
        checked = 0
        filled = [group for group, count in enumerate(counts) if count]
        for place_of_group in rng.sample(range(len(filled)), min(_GROUPS, len(filled))):
            group = filled[place_of_group]
            rows = sorted(rng.sample(range(counts[group]), min(_ROWS, counts[group])))
            _Sample(
                raw=taken(raw.read_row_group(group, use_threads=False), rows),
                new=taken(_read_group(new, place_of_group), rows),
                rows=[firsts[group] + row for row in rows],
                place=place,
            ).compare(remapper)
            checked += len(rows)
    return checked


def _read_group(new: Any, group: int) -> pa.Table:
    """A row group, or the record batch that it became."""
    if isinstance(new, pq.ParquetFile):
        return new.read_row_group(group, use_threads=False)
    return pa.Table.from_batches([new.get_batch(group)])


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sample:
    """Some rows of a raw file, and what they became."""

    raw: pa.Table
    new: pa.Table
    rows: Sequence[int]
    """Their numbers in the file."""
    place: str
    """The new file, for messages."""

    def compare(self, remapper: Remapper) -> None:
        """Raises DataFileError where they differ."""
        place = 0
        for raw_place, field in enumerate(self.raw.schema):  # by their places: names may be there twice
            new_fields = remapper.fields(field)
            if new_fields[0].name == field.name:
                self._same(self.raw.column(raw_place), self.new.column(place), field.name)
            place += len(new_fields)
        for feature in remapper.format.features.values():
            array = self.raw.column(feature.column).combine_chunks()
            if pa.types.is_dictionary(array.type):
                array = array.dictionary_decode()  # its nulls may lie in the dictionary
            bags = to_column(array)
            codebook, helper = expected_codes(remapper.maps[feature.table], bags.values)
            for columns, codes in ((feature.pointers, codebook), (feature.helpers, helper)):
                if columns:
                    found = self._codes(columns, array, bags, feature, remapper.format.layout)
                    self._same_codes(found, codes, bags, feature)

    def _codes(
        self, columns: Sequence[str], raw: pa.Array, bags: Column, feature: RemappedFeature, layout: Layout
    ) -> npt.NDArray[np.unsignedinteger]:
        """The codes in new columns, [N, c]; they have the nulls and the lengths of the raw column."""
        arrays = [self.new.column(name).combine_chunks() for name in columns]
        for array in arrays:
            self._same(raw.is_null(), array.is_null(), feature.column)
            if is_id_list(array.type):
                self._same(pa.array(bags.dense_lengths()), array.value_lengths().fill_null(0), feature.column)
        values = [array.flatten() if is_id_list(array.type) else array.drop_null() for array in arrays]
        return codes_of(values, feature, layout)

    def _same_codes(
        self,
        found: npt.NDArray[np.unsignedinteger],
        wanted: npt.NDArray[np.int64],
        bags: Column,
        feature: RemappedFeature,
    ) -> None:
        wrong = np.flatnonzero((found != wanted).any(axis=1))
        if not len(wrong):
            return
        at = int(wrong[0])
        row = self.rows[bags.row_of(at)]
        raise DataFileError(
            f"{self.place}: column {feature.pointers[0]!r}, row {row} (the first is 0) has the codes "
            f"{found[at].tolist()}, the map of table {feature.table!r} gives {wanted[at].tolist()}; remap it again"
        )

    def _same(self, raw: Any, new: Any, name: str) -> None:
        raw, new = (column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column for column in (raw, new))
        if alike(raw, new):
            return
        for place, row in enumerate(self.rows):
            if not alike(raw.slice(place, 1), new.slice(place, 1)):
                raise DataFileError(
                    f"{self.place}: column {name!r}, row {row} (the first is 0) is not as in the raw file"
                )


def taken(table: pa.Table, rows: Sequence[int]) -> pa.Table:
    """Some rows of a table, in ascending order, of any types; `Table.take` does not know all."""
    return pa.concat_tables([table.slice(row, 1) for row in rows]) if rows else table.slice(0, 0)


def alike(raw: Any, new: Any) -> bool:
    """Whether two arrays have the same values, to the last bit: NaN is itself."""
    if raw.equals(new):
        return True
    kind = raw.type
    if kind != new.type or len(raw) != len(new):
        return False
    if isinstance(raw, pa.ExtensionArray):
        return alike(raw.storage, new.storage)
    if pa.types.is_dictionary(kind):
        return alike(raw.dictionary_decode(), new.dictionary_decode())
    if not raw.is_null().equals(new.is_null()):
        return False
    if pa.types.is_floating(kind):
        unsigned = {16: pa.uint16(), 32: pa.uint32(), 64: pa.uint64()}[kind.bit_width]
        return bool(raw.drop_null().view(unsigned).equals(new.drop_null().view(unsigned)))
    if pa.types.is_struct(kind):
        return all(alike(*pair) for pair in zip(raw.flatten(), new.flatten(), strict=True))
    if pa.types.is_map(kind):
        lists = pa.list_(pa.struct([kind.key_field.with_name("key"), kind.item_field.with_name("value")]))
        return alike(raw.cast(lists), new.cast(lists))
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return alike(*(array.cast(pa.large_list(kind.value_field)) for array in (raw, new)))
    if is_list(kind):
        lengths = raw.value_lengths().equals(new.value_lengths()) if not pa.types.is_fixed_size_list(kind) else True
        return bool(lengths) and alike(raw.flatten(), new.flatten())
    return False


def expected_codes(
    pointer_map: PointerMap, ids: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Codebook and helper codes of raw `ids: [N] int64`, [N, c] each, by the map's policy, in plain numpy."""
    positions = pointer_map.positions(ids)
    unseen = positions < 0
    if pointer_map.unseen == "first_row":
        ids, positions = np.where(unseen, pointer_map.first_id, ids), np.where(unseen, 0, positions)
        unseen = np.zeros_like(unseen)
    codebook = pointer_map.codebook_hash.numpy(ids)
    if pointer_map.stored is not None:
        codebook[~unseen] = pointer_map.learned_codes[positions[~unseen]]
    return codebook, pointer_map.helper_hash.numpy(ids)
