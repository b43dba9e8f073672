"""Raw IDs to index pointers, one record batch at a time. Nothing here reads or writes a file."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from torchrec_cce.data.arrow import BadCell, check_columns, id_type, to_column
from torchrec_cce.data.remapped_format import (
    METADATA_KEY,
    Layout,
    RemappedFeature,
    RemappedFormat,
    pointer_arrays,
    word_arrays,
)
from torchrec_cce.errors import DataFileError, InvalidIDError
from torchrec_cce.jobs.remap.schema_keys import rewritten
from torchrec_cce.kernels.packed import unpack
from torchrec_cce.maps.pointer_format import PointerFormat
from torchrec_cce.maps.pointer_map import PointerMap, Resolved

Words = list[npt.NDArray[np.uint64]]
UnseenCounts = Counter[str]
"""Key of a feature in the format → how many raw IDs of the rows its map does not know, and has something for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureMap:
    """The map of one feature, and the columns that its raw column becomes."""

    key: str
    """Of the feature in the format."""
    feature: RemappedFeature
    pointer_map: PointerMap

    @cached_property
    def _form(self) -> PointerFormat:
        return self.feature.pointer_format

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Names of the pointers' columns, and of the helper codes' if they are stored."""
        return (*self.feature.pointers, *self.feature.helpers)

    def find(self, ids: npt.NDArray[np.int64]) -> tuple[Words, Resolved]:
        """The words of raw `ids: [N] int64`, of the codebook pointers and then of the helper codes if they are stored;
        and what the IDs are to the map.
        """
        return self.pointer_map.uint64s(ids, self._form, helper=bool(self.feature.helpers))

    def arrays(self, words: Words, layout: Layout) -> list[pa.Array]:
        """The words that `find` gave as the columns of a layout, one ID a row."""
        if layout == "words":
            return word_arrays(words)
        count, c, dtype = self.feature.num_words, self.feature.num_columns, self.feature.dtype
        return [
            array
            for start in range(0, len(words), count)
            for array in pointer_arrays(unpack(words[start : start + count], num_columns=c, dtype=dtype), layout)
        ]


class UnseenID(BadCell):
    """A raw ID that its map does not know, and must know by its policy."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Remapper:
    """All maps of a job: what it does to a schema, and to a batch."""

    format: RemappedFormat
    maps: Mapping[str, PointerMap]
    """Table → its map."""

    def features_of(self, column: str) -> list[FeatureMap]:
        """The features whose raw column this is, in the format's order; none for a column that is left as it is."""
        return [
            FeatureMap(key=key, feature=feature, pointer_map=self.maps[feature.table])
            for key, feature in self.format.features.items()
            if feature.column == column
        ]

    def schema(self, schema: pa.Schema, name: str) -> pa.Schema:
        """The schema of the remapped data; `name` is that of the file, for messages.

        Raises:
            DataFileError: a feature's column is missing or holds no IDs, a new column has the name of another, or the
                data are remapped already.
        """
        metadata = dict(schema.metadata or {})
        if METADATA_KEY in metadata:
            raise DataFileError(f"{name}: is remapped already; remap the raw data")
        check_columns(name, schema, [], [feature.column for feature in self.format.features.values()])
        made = {feature.column: self.fields(schema.field(feature.column)) for feature in self.format.features.values()}
        raw_names = schema.names
        fields = [field for raw in schema for field in made.get(raw.name, [raw])]
        raw_counts, counts = Counter(raw_names), Counter(field.name for field in fields)
        for new, count in counts.items():
            if count > max(1, raw_counts[new]):
                raise DataFileError(f"{name}: the raw data have a column {new!r} already; rename it")
        return pa.schema(fields, {**rewritten(metadata, raw_names, made), METADATA_KEY: self.format.to_json()})

    def fields(self, raw: pa.Field) -> list[pa.Field]:
        """The fields that take the place of a raw field."""
        found = self.features_of(raw.name)
        if not found:
            return [raw]
        keep = [raw] if self.format.helper == "keep-raw" else []
        return keep + [
            pa.field(name, _column_type(raw.type, feature_map.feature.item_type(self.format.layout)), raw.nullable)
            for feature_map in found
            for name in feature_map.columns
        ]

    def batch(
        self, batch: pa.RecordBatch, name: str, *, first_row: int = 0, unseen: UnseenCounts | None = None
    ) -> pa.RecordBatch:
        """The remapped batch.

        Args:
            name, first_row: of the file, and of the batch in it, for messages.
            unseen: what is counted in the batch is added to it.

        Raises:
            InvalidIDError: an ID that its map does not know; names file, column, row and value.
            DataFileError: a null in a list, or what `schema` says.
        """
        schema = self.schema(batch.schema, name)
        arrays = [
            array
            for raw, values in zip(batch.schema, batch.columns, strict=True)
            for array in self.columns(raw.name, values, name, first_row=first_row, unseen=unseen)
        ]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)

    def columns(
        self, column: str, array: pa.Array, name: str, *, first_row: int = 0, unseen: UnseenCounts | None = None
    ) -> list[pa.Array]:
        """What takes the place of a raw column in a batch. Arguments and errors: as `batch`."""
        found = self.features_of(column)
        if not found:
            return [array]
        keep = [array] if self.format.helper == "keep-raw" else []
        try:
            return keep + [new for each in found for new in _remapped(array, each, self.format.layout, unseen)]
        except BadCell as error:
            kind = InvalidIDError if isinstance(error, UnseenID) else DataFileError
            raise kind(f"{name}: column {column!r}, row {first_row + error.row} (the first is 0) {error}") from None


def _column_type(raw: pa.DataType, item: pa.DataType) -> pa.DataType:
    if pa.types.is_large_list(raw):
        return pa.large_list(pa.field("element", item, nullable=False))
    if pa.types.is_list(raw) or pa.types.is_fixed_size_list(raw):
        return pa.list_(pa.field("element", item, nullable=False))
    return item


def _remapped(array: pa.Array, feature_map: FeatureMap, layout: Layout, counts: UnseenCounts | None) -> list[pa.Array]:
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()  # its nulls may lie in the dictionary
    column = to_column(array)
    words, found = feature_map.find(column.values)
    if found.bad >= 0:
        row = column.row_of(found.bad)
        value = int(column.values[found.bad])
        shown = value % 2**64 if value < 0 and pa.types.is_unsigned_integer(id_type(array.type)) else value
        known = feature_map.pointer_map
        where = f"0..{known.num_ids - 1}" if known.vocabulary is None else f"the {known.num_ids} of its vocabulary"
        raise UnseenID(
            row,
            f"holds raw ID {shown}, which the map of table {feature_map.feature.table!r} does not know (its IDs are "
            f'{where}); correct the data, or publish a map with unseen="hash"',
        )
    if counts is not None and found.unseen is not None:
        counts[feature_map.key] += found.num_unseen
    kind = _column_type(array.type, feature_map.feature.item_type(layout))
    if kind == feature_map.feature.item_type(layout):
        return [_with_nulls(items, array, layout) for items in feature_map.arrays(words, layout)]
    large = pa.types.is_large_list(kind)
    build = pa.LargeListArray if large else pa.ListArray
    starts = pa.array(column.offsets if large else column.offsets.astype(np.int32))
    mask = array.is_null() if array.null_count else None
    return [build.from_arrays(starts, items, type=kind, mask=mask) for items in feature_map.arrays(words, layout)]


def _with_nulls(items: pa.Array, raw: pa.Array, layout: Layout) -> pa.Array:
    """`items`, one for each row of `raw` that is not null, with the nulls of `raw`."""
    if len(items) == len(raw):
        return items
    valid = raw.is_valid().to_numpy(zero_copy_only=False)
    mask = pa.array(~valid)
    flat, width = (items, 1) if layout == "words" else (items.flatten(), items.type.list_size)
    values = flat.to_numpy(zero_copy_only=True).reshape(len(items), width)
    full = np.zeros((len(raw), width), values.dtype)
    full[valid] = values
    if layout == "words":
        return pa.array(full.reshape(-1), mask=~valid)
    return pa.FixedSizeListArray.from_arrays(pa.array(full.reshape(-1)), type=items.type, mask=mask)
