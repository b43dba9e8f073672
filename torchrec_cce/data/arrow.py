"""Arrow arrays as the parts of `Rows`, and back. Nothing here reads a file: callers add the path to a `BadCell`."""

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from torchrec_cce.data.files import PathLike
from torchrec_cce.data.rows import Column
from torchrec_cce.errors import DataFileError


class BadCell(ValueError):
    """A cell that must not be in its column. The message says what was found and what is allowed."""

    def __init__(self, row: int, message: str) -> None:
        super().__init__(message)
        self.row = row


def check_columns(place: PathLike, schema: pa.Schema, numbers: Collection[str], ids: Collection[str]) -> None:
    """Check that there is one column of each of these names, and that it is of a type that is read.

    Args:
        place: the file that has the schema, for messages.
        numbers: dense features and labels: integers, floats or booleans.
        ids: integers, dictionary-encoded integers, or lists of them.

    Raises:
        DataFileError: names the column, and what is allowed.
    """
    for name in [*numbers, *ids]:
        found = len(schema.get_all_field_indices(name))
        if found != 1:
            what = "there is no column" if found == 0 else f"{found} columns have the name"
            raise DataFileError(f"{place}: {what} {name!r}; the columns are {schema.names}")
    for why_not, names in ((_why_not_numbers, numbers), (_why_not_ids, ids)):
        for name in names:
            wrong = why_not(schema.field(name).type)
            if wrong:
                raise DataFileError(f"{place}: column {name!r} {wrong}")


def to_column(array: pa.Array) -> Column:
    """The bags of an ID column: [N] of a type that `check_columns` accepts.

    A null ID and a null list are empty bags; uint64 becomes its two's complement.

    Raises:
        BadCell: a null inside a list.
    """
    if is_list(array.type):
        lengths = _numpy(pc.fill_null(pc.list_value_length(array), 0)).astype(np.int32)
        # flatten() leaves out what lies under null lists and outside the slice that this array may be.
        values = _decoded(array.flatten())
        if values.null_count:
            first = int(np.argmax(_numpy(values.is_null())))
            row = int(np.searchsorted(np.cumsum(lengths, dtype=np.int64), first, side="right"))
            raise BadCell(row, "holds a list with a null in it; a list may be empty or null, its items may not")
        return Column(values=_int64(values), lengths=lengths)
    array = _decoded(array)
    if not array.null_count:
        return Column(values=_int64(array))
    return Column(values=_int64(array.drop_null()), lengths=_numpy(array.is_valid()).astype(np.int32))


def to_dense(array: pa.Array) -> npt.NDArray[np.float32]:
    """[N] float32 of a numeric column; null is 0.

    Raises:
        BadCell: NaN or infinite, also when only float32 makes it so.
    """
    values = _numpy(pc.fill_null(array.cast(pa.float32(), safe=False), 0.0))
    bad = ~np.isfinite(values)
    if bad.any():
        row = int(np.argmax(bad))
        raise BadCell(row, f"is {array[row].as_py()}; it must be finite in float32, or null for 0")
    return values.astype(np.float32, copy=False)


def to_labels(array: pa.Array) -> npt.NDArray[np.float32]:
    """[N] float32 of a numeric column.

    Raises:
        BadCell: null, or neither 0 nor 1.
    """
    # A null becomes a value that is refused.
    values = _numpy(pc.fill_null(array.cast(pa.float64(), safe=False), -1.0))
    bad = (values != 0) & (values != 1)
    if bad.any():
        row = int(np.argmax(bad))
        found = array[row].as_py()
        raise BadCell(row, f"is {'null' if found is None else found}; a label must be 0 or 1")
    return values.astype(np.float32)


def from_column(column: Column, *, multi_hot: bool) -> pa.Array:
    """[N] list<int64> if `multi_hot`, else [N] int64 with null for an empty bag.

    Raises:
        BadCell: not `multi_hot`, and a bag holds more than one ID.
    """
    lengths = column.dense_lengths()
    if multi_hot:
        return pa.ListArray.from_arrays(pa.array(column.offsets.astype(np.int32)), pa.array(column.values))
    if column.lengths is None:
        return pa.array(column.values)
    if lengths.max(initial=0) > 1:
        row = int(np.argmax(lengths > 1))
        raise BadCell(row, f"is a bag of {lengths[row]} IDs; name the feature in multi_hot to write its bags as lists")
    single = np.zeros(len(lengths), dtype=np.int64)
    single[lengths == 1] = column.values
    return pa.array(single, mask=lengths == 0)


def id_type(kind: pa.DataType) -> pa.DataType:
    """The type of the IDs in a column: itself, or that of the items of a list, also of a dictionary."""
    item = kind.value_type if is_list(kind) else kind
    return item.value_type if pa.types.is_dictionary(item) else item


def _why_not_ids(kind: pa.DataType) -> str | None:
    """None if a column of this type holds IDs; else what it is and what to do."""
    kind = id_type(kind)
    if pa.types.is_integer(kind):
        return None
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind):
        return (
            f"is {kind}, not integer; replace each by an integer first, e.g. a 64-bit hash of it, or its index from "
            "pyarrow.compute.dictionary_encode"
        )
    return f"is {kind}; IDs are integers, dictionary-encoded integers, or lists of them"


def _why_not_numbers(kind: pa.DataType) -> str | None:
    """None if a column of this type can be a dense feature or a label; else what it is and what is allowed."""
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return None
    return f"is {kind}; it must be an integer, a float or a boolean"


def is_list(kind: pa.DataType) -> bool:
    """Whether a column of this type has lists in its cells, of one length or of any."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _decoded(array: pa.Array) -> pa.Array:
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _int64(array: pa.Array) -> npt.NDArray[np.int64]:
    """An integer array without nulls; int64 and uint64 are not copied."""
    values = _numpy(array)
    return values.view(np.int64) if values.dtype == np.uint64 else values.astype(np.int64, copy=False)


def _numpy(array: pa.Array) -> npt.NDArray[Any]:
    values: npt.NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return values
