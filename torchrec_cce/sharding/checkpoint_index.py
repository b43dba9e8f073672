"""The index of a distributed checkpoint, `.metadata`: a pickle, which is read so that nothing runs that it names."""

import io
import pathlib
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from torchrec_cce.errors import DataFileError

METADATA = ".metadata"
"""What `torch.distributed.checkpoint` calls its index."""

_RECORDS = {
    (kind.__module__, kind.__name__): kind
    for kind in (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
        filesystem._StorageInfo,
    )
}
"""What an index is made of: records, which do nothing when they are made."""
_VALUES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("pathlib", "PosixPath"): pathlib.PosixPath,
    ("torch", "Size"): torch.Size,
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): metadata._MEM_FORMAT_ENCODING,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}
"""What their fields hold. `_get_layout` looks a name up in a dictionary."""


class _IndexUnpickler(pickle._Unpickler):
    """Makes the records of an index and their values, by exact names, and refuses everything else.

    It is Python's own reference implementation, not the one in C, because a pickle may also change what it has found:
    the instruction BUILD sets any attribute of any object, of a class too. Here it fills records alone.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        found = _RECORDS.get((module, name)) or _VALUES.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no index is made of")
        return found

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError(f"it names the extension {code}, which no index is made of")

    def load_build(self, fill: Callable[[Any], None] = dispatch[pickle.BUILD[0]]) -> None:
        if type(self.stack[-2]) not in _RECORDS.values():
            raise pickle.UnpicklingError("it changes an object that is no record of an index")
        fill(self)

    dispatch[pickle.BUILD[0]] = load_build


def read_index(folder: Path) -> Metadata:
    """The index of the distributed checkpoint `folder`.

    Raises:
        DataFileError: it is missing, damaged, of another version of PyTorch, or names what no index is made of.
    """
    path = folder / METADATA
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataFileError(f"{path}: no such file; copy the checkpoint again") from error
    try:
        found = _IndexUnpickler(io.BytesIO(content)).load()
        wrong = _wrong_in(found)
    except Exception as error:  # whatever a damaged pickle leads to
        reason = str(error) or type(error).__name__
        raise DataFileError(f"{path}: damaged, or of another version of PyTorch ({reason}); copy it again") from error
    if wrong is not None:
        raise DataFileError(f"{path}: {wrong}; it is damaged, or not the index of a distributed checkpoint")
    return found  # type: ignore[no-any-return]


def _wrong_in(found: Any) -> str | None:
    """What is wrong with an index; None if its records fit together."""
    if not isinstance(found, Metadata):
        return f"holds a {type(found).__name__}"
    entries: dict[Any, Any] = found.state_dict_metadata  # whatever the pickle says
    for key, entry in entries.items():
        if isinstance(entry, TensorStorageMetadata):
            if not isinstance(entry.properties.dtype, torch.dtype) or not _are_within(entry):
                return f"the parts of {key!r} are no parts of it"
        elif not isinstance(entry, BytesStorageMetadata):
            return f"has a {type(entry).__name__} for {key!r}"
    for index, stored in found.storage_data.items():
        if index.fqn not in entries:
            return f"has a place for {index.fqn!r}, and nothing else of it"
        if stored.relative_path in ("", "..") or Path(stored.relative_path).name != stored.relative_path:
            return f"has a part of {index.fqn!r} outside of its folder, in {stored.relative_path!r}"
        if stored.transform_descriptors or stored.offset < 0 or stored.length < 0:
            return f"has a part of {index.fqn!r} at no place of a file"
    return None


def _are_within(tensor: TensorStorageMetadata) -> bool:
    return all(
        len(chunk.offsets) == len(chunk.sizes) == len(tensor.size)
        and all(
            0 <= start <= start + length <= size
            for start, length, size in zip(chunk.offsets, chunk.sizes, tensor.size, strict=True)
        )
        for chunk in tensor.chunks
    )
