"""One array as one Arrow IPC file: a single column in a single, uncompressed record batch, so that reading is mapping.

The values begin at a multiple of 64 bytes from the start of the file, as in memory. pyarrow aligns to 8; the schema's
metadata is padded to make up for it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from torchrec_cce.errors import MapFileError

ALIGNMENT = 64
_MAGIC_BYTES = 8
_PADDING = "padding"


class Sink(Protocol):
    """What a file is written to, front to back."""

    def write(self, data: memoryview, /) -> object: ...


class ArrowOutput:
    """A file object for Arrow that hands large buffers on in small pieces, so that no sink ever copies a whole map."""

    _SIZE = 4 << 20
    closed = False

    def __init__(self, write: Callable[[memoryview], object]) -> None:
        self._write = write
        self._position = 0

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        for start in range(0, len(view), self._SIZE):
            self._write(view[start : start + self._SIZE])
        self._position += len(view)
        return len(view)

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        self.closed = True


def list_array(matrix: npt.NDArray[np.generic]) -> pa.FixedSizeListArray:
    """`matrix: [n, c]` as n lists of c values, without a copy if it is contiguous."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(matrix).reshape(-1)), matrix.shape[1])


def write_array(sink: Sink, name: str, array: pa.Array, metadata: Mapping[str, str] | None = None) -> None:
    """Write `array`, without nulls, as the column `name`; `metadata` is that of the schema."""
    batch = _batch(name, array, metadata, padding=0)
    kind, per_row = array.type, 1
    if pa.types.is_fixed_size_list(kind):
        kind, per_row = kind.value_type, kind.list_size
    body_bytes = -(-len(array) * per_row * kind.bit_width // 64) * 8
    metadata_bytes = pa.ipc.get_record_batch_size(batch) - body_bytes
    begin = _MAGIC_BYTES + len(batch.schema.serialize()) + metadata_bytes
    batch = _batch(name, array, metadata, padding=-begin % ALIGNMENT)
    file = pa.PythonFile(ArrowOutput(sink.write), mode="w")
    with pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


def read_array(path: Path, name: str, expected: pa.DataType, length: int) -> pa.Array:
    """Memory-map the column `name` of a file that `write_array` made.

    Raises:
        MapFileError: the file is cut short, no Arrow file, or holds another column, type or length, or nulls.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if reader.num_record_batches != 1 or reader.schema.names != [name]:
            raise MapFileError(
                f"{path}: {reader.num_record_batches} record batches of columns {reader.schema.names}, not one of "
                f"{name!r}; copy or publish it again"
            )
        array = reader.get_batch(0).column(0)
        array.validate()
    except (pa.ArrowException, OSError, ValueError, IndexError) as error:
        if isinstance(error, MapFileError):
            raise
        raise MapFileError(f"{path}: not a complete Arrow file ({error}); copy or publish it again") from error
    if array.type != expected or len(array) != length or array.null_count:
        raise MapFileError(
            f"{path}: {len(array)} values of {array.type} with {array.null_count} nulls, not {length} of {expected}; "
            "copy or publish it again"
        )
    return array


def numbers(array: pa.Array) -> npt.NDArray[Any]:
    """[N] read-only numpy view of an array of numbers without nulls.

    pyarrow's `to_numpy` imports pandas, if that is installed, which takes longer than to open a map.
    """
    dtype = np.dtype(array.type.to_pandas_dtype())
    if len(array) == 0:
        return np.empty(0, dtype)
    view = np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * dtype.itemsize)
    view.flags.writeable = False
    return view


def _batch(name: str, array: pa.Array, metadata: Mapping[str, str] | None, *, padding: int) -> pa.RecordBatch:
    field = pa.field(name, array.type, nullable=False)
    schema = pa.schema([field], {**(metadata or {}), _PADDING: " " * padding})
    return pa.record_batch([array], schema=schema)
