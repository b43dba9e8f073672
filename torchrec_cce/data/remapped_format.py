"""Data files that hold index pointers in place of raw IDs: their schema, and pointers as columns and back.

A CCE table's feature becomes pointer columns at the place of its raw column. The schema's metadata says, in JSON, which
version of which map they are of. In the layout `words` the `c` pointers of an ID are packed into 64-bit words, column 0
in the lowest bits; in `lists` they are a list of `c`. A raw column of lists becomes lists of either.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from torchrec_cce.errors import DataFileError
from torchrec_cce.kernels.packed import num_words, pack, unpack
from torchrec_cce.maps.manifest import Positive, Sha256
from torchrec_cce.maps.pointer_format import MinPointerBits, PointerFormat, PointerType

FORMAT = 2
"""Format 2 has words of pointers of 4 bits. Without them, data is still of format 1, which older readers read."""
METADATA_KEY = b"torchrec_cce.remapped"
"""Of the JSON document in the metadata of a file's schema."""

Layout = Literal["words", "lists"]
"""Pointers packed into 64-bit words, in columns of int64, or as lists of `c` of the pointers' own width. (The bits of a
word are unsigned; Parquet's readers take twice as long over unsigned columns, and Spark has none.)"""
HelperPolicy = Literal["drop", "store", "keep-raw"]
"""What stays for the helper: nothing; its codes beside the pointers; or the raw column, to hash them from again."""

_CONFIG = ConfigDict(extra="forbid")


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class RemappedFeature:
    """A feature of one CCE table, and the columns that its raw column became."""

    feature: str
    table: str
    column: str
    """The raw column."""
    map_digest: Sha256
    num_columns: Positive
    """`c`."""
    num_rows: Positive
    """`k`: codes are in `0..k - 1`."""
    pointer_dtype: PointerType
    """`uint4`, in words alone: 16 codes a word."""
    pointers: tuple[str, ...]
    """The columns of codebook pointers: one, or several where `c` pointers take several words."""
    helpers: tuple[str, ...] = ()
    """The columns of helper codes, as many; none if they are not stored."""

    def __post_init__(self) -> None:
        if self.pointer_dtype == "uint4" and self.num_columns == 1:
            raise ValueError("pointer_dtype='uint4' is for two columns or more")

    @property
    def pointer_format(self) -> PointerFormat:
        """How the codes of an ID lie in its words, or in its list."""
        return PointerFormat.named(self.pointer_dtype, num_columns=self.num_columns)

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Of a code, once it is read."""
        return self.pointer_format.dtype

    @property
    def num_words(self) -> int:
        """Words that hold the `c` pointers of an ID."""
        return num_words(self.num_columns, self.pointer_format.bits)

    def item_type(self, layout: Layout) -> pa.DataType:
        """Of the pointers of one ID in a column."""
        if layout == "words":
            return pa.int64()
        return _list_type(self.dtype, self.num_columns)


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class RemappedFormat:
    """What the metadata of a file of remapped data says. All files of one job say the same."""

    format: Literal[1, 2] = 1
    version: Positive
    """Of the maps, in their registry."""
    manifest_sha256: Sha256
    """Of the version's manifest."""
    layout: Layout
    helper: HelperPolicy
    features: dict[str, RemappedFeature]
    """By the feature's name, or `feature@table` where several CCE tables share the feature."""

    def __post_init__(self) -> None:
        if self.format < format_of(self.features):
            raise ValueError(f"format={self.format} has no pointers of 4 bits; they came with format 2")
        if self.layout != "words" and format_of(self.features) == 2:
            raise ValueError(f"layout={self.layout!r} has no pointers of 4 bits; words have")

    def find(self, feature: str, table: str) -> RemappedFeature | None:
        """The columns of a table's feature, None if it is not in the file."""
        found = (each for each in self.features.values() if (each.feature, each.table) == (feature, table))
        return next(found, None)

    def to_json(self) -> bytes:
        """The document; equal formats give equal bytes."""
        return json.dumps(_ADAPTER.dump_python(self, mode="json")).encode()

    @classmethod
    def from_json(cls, document: bytes, name: str) -> "RemappedFormat":
        """Read a document; `name` is that of its file, for messages.

        Raises:
            DataFileError: no such document, or of a later format.
        """
        try:
            found = json.loads(document)
            number = found.get("format") if isinstance(found, dict) else None
            if isinstance(number, int) and number > FORMAT:
                raise DataFileError(
                    f"{name}: remapped data of format {number}; this torchrec_cce reads formats up to {FORMAT}, "
                    "upgrade it or remap the data again"
                )
            return _ADAPTER.validate_json(document, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise DataFileError(f"{name}: its metadata {METADATA_KEY.decode()!r}: {place}: {first['msg']}") from error
        except ValueError as error:
            if isinstance(error, DataFileError):
                raise
            raise DataFileError(f"{name}: its metadata {METADATA_KEY.decode()!r} is not JSON ({error})") from error

    @classmethod
    def of_schema(cls, schema: pa.Schema, name: str) -> "RemappedFormat":
        """What the schema of a file says; `name` is that of the file, for messages.

        Raises:
            DataFileError: the file holds no remapped data, of a later format, or not the columns that it should.
        """
        document = (schema.metadata or {}).get(METADATA_KEY)
        if document is None:
            raise DataFileError(f"{name}: holds no remapped data; make it with torchrec-cce remap")
        found = cls.from_json(document, name)
        for feature in found.features.values():
            raw = [feature.column] if found.helper == "keep-raw" else []
            for column in (*feature.pointers, *feature.helpers, *raw):
                if len(schema.get_all_field_indices(column)) != 1:
                    raise DataFileError(
                        f"{name}: there is not one column {column!r}, as its metadata says of feature "
                        f"{feature.feature!r}; the columns are {schema.names}"
                    )
            wanted = feature.item_type(found.layout)
            for column in (*feature.pointers, *feature.helpers):
                kind = schema.field(column).type
                item = kind.value_type if is_id_list(kind) else kind
                if wanted not in (kind, item):
                    raise DataFileError(f"{name}: column {column!r} is {kind}, not {wanted} or a list of it")
        return found


def format_of(features: Mapping[str, RemappedFeature]) -> Literal[1, 2]:
    """The oldest format that has all that these features have."""
    return 2 if any(feature.pointer_dtype == "uint4" for feature in features.values()) else 1


_ADAPTER = TypeAdapter(RemappedFormat)


def remapped_feature(
    feature: str,
    *,
    table: str,
    column: str,
    map_digest: str,
    num_columns: int,
    num_rows: int,
    layout: Layout,
    helper: HelperPolicy,
    shared: bool = False,
    min_pointer_bits: MinPointerBits = 8,
) -> RemappedFeature:
    """A feature with the names of its columns: `feature.pointers`, `feature.helpers`, numbered where there are several.

    Args:
        shared: several CCE tables have the feature; then names begin with `feature@table`.
        min_pointer_bits: of the map. In lists, every code is a number of its own, of 8 bits or more.
    """
    least: MinPointerBits = min_pointer_bits if layout == "words" else 8
    form = PointerFormat.that_holds(num_rows, num_columns=num_columns, min_bits=least)
    unnamed = RemappedFeature(
        feature=feature,
        table=table,
        column=column,
        map_digest=map_digest,
        num_columns=num_columns,
        num_rows=num_rows,
        pointer_dtype=form.name,
        pointers=(),
    )
    count = unnamed.num_words if layout == "words" else 1

    def names(kind: str) -> tuple[str, ...]:
        base = f"{feature_key(feature, table, shared=shared)}.{kind}"
        return (base,) if count == 1 else tuple(f"{base}.{word}" for word in range(count))

    return replace(unnamed, pointers=names("pointers"), helpers=names("helpers") if helper == "store" else ())


def feature_key(feature: str, table: str, *, shared: bool) -> str:
    """The name of a table's feature in `RemappedFormat.features` and before its columns' names."""
    return f"{feature}@{table}" if shared else feature


def is_id_list(kind: pa.DataType) -> bool:
    """Whether a column of this type holds any number of IDs in a row."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def pointer_arrays(codes: npt.NDArray[np.unsignedinteger], layout: Layout) -> list[pa.Array]:
    """`codes: [N, c]` as the columns of a layout, one ID a row; `codes_of` is the inverse."""
    if layout == "words":
        return word_arrays(pack(codes))
    values = pa.array(np.ascontiguousarray(codes).reshape(-1))
    return [pa.FixedSizeListArray.from_arrays(values, type=_list_type(codes.dtype, codes.shape[1]))]


def word_arrays(words: Sequence[npt.NDArray[np.uint64]]) -> list[pa.Array]:
    """Words, [N] uint64 each, as the columns of the layout `words`."""
    return [pa.array(word.view(np.int64)) for word in words]


def codes_of(arrays: Sequence[pa.Array], feature: RemappedFeature, layout: Layout) -> npt.NDArray[np.unsignedinteger]:
    """The codes [N, c] in the columns of a feature, one ID a row, without nulls: `pointers` or `helpers`."""
    if layout == "words":
        words = [array.to_numpy(zero_copy_only=True).view(np.uint64) for array in arrays]
        form = feature.pointer_format
        return form.decode(unpack(words, num_columns=form.width, dtype=form.dtype))
    (array,) = arrays
    codes: npt.NDArray[np.unsignedinteger] = array.flatten().to_numpy(zero_copy_only=True)
    return codes.reshape(len(array), feature.num_columns)


def _list_type(dtype: np.dtype[np.unsignedinteger], num_columns: int) -> pa.DataType:
    # Named as Parquet does, and nullable, because Parquet's reader puts nulls below a null list.
    return pa.list_(pa.field("element", pa.from_numpy_dtype(dtype)), num_columns)


LAYOUTS: tuple[Layout, ...] = get_args(Layout)
HELPER_POLICIES: tuple[HelperPolicy, ...] = get_args(HelperPolicy)
