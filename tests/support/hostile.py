"""Runs of strangers whose files would run code if they were unpickled without a look."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from torchrec_cce.sharding.checkpoint_index import METADATA
from torchrec_cce.sharding.digests import renew_digests


class Payload:
    """Unpickled, it makes the file `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.marker)!r}, 'w').close()",)


def in_place_of_the_index(folder: Path, marker: Path) -> None:
    (folder / METADATA).write_bytes(pickle.dumps(Payload(marker)))


def inside_of_the_index(folder: Path, marker: Path) -> None:
    index = pickle.loads((folder / METADATA).read_bytes())
    index.planner_data = Payload(marker)
    (folder / METADATA).write_bytes(pickle.dumps(index))


def in_tensors(folder: Path, marker: Path) -> None:
    index = pickle.loads((folder / METADATA).read_bytes())
    place = _store(folder, Payload(marker))
    index.storage_data = dict.fromkeys(index.storage_data, place)
    (folder / METADATA).write_bytes(pickle.dumps(index))


def in_values_that_are_no_tensors(folder: Path, marker: Path) -> None:
    """Which is what the index says of all tensors: PyTorch would unpickle these."""
    index = pickle.loads((folder / METADATA).read_bytes())
    place = _store(folder, Payload(marker))
    index.state_dict_metadata = {key: BytesStorageMetadata() for key in index.state_dict_metadata}
    index.storage_data = {MetadataIndex(key): place for key in index.state_dict_metadata}
    (folder / METADATA).write_bytes(pickle.dumps(index))


def _store(folder: Path, value: Any) -> Any:
    """Write `value` to a new file of tensors. Returns its place."""
    content = io.BytesIO()
    torch.save(value, content)
    (folder / "__9_0.distcp").write_bytes(content.getvalue())
    return _StorageInfo("__9_0.distcp", 0, len(content.getvalue()))


ATTACKS = (in_place_of_the_index, inside_of_the_index, in_values_that_are_no_tensors, in_tensors)


def forge_digests(folder: Path) -> None:
    """Whoever makes the files can make their digests."""
    renew_digests(folder)
