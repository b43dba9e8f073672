"""Reads a distributed checkpoint into tensors, on one process or on all ranks, and runs nothing that is in it."""

import io
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from torchrec_cce.errors import DataFileError
from torchrec_cce.sharding.checkpoint_index import read_index


class _Reader(FileSystemReader):
    """PyTorch's, but for the index, which that would unpickle whatever it names."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        found = read_index(Path(self.path))
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Planner(DefaultLoadPlanner):
    """PyTorch's, but for values that are no tensors, which that would unpickle whatever they name."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        key = read_item.dest_index.fqn
        if isinstance(self.state_dict[key], torch.Tensor):
            raise DataFileError(f"{key!r} is a tensor of the model, and none of the checkpoint")
        read = torch.load(value, map_location="cpu", weights_only=True)
        set_element(self.original_state_dict, self.mappings[key], read)


def read_into(state: dict[str, Any], folder: Path, *, no_dist: bool = False) -> None:
    """Read what `state` names, which may be nested, into its tensors, and put other values in place.

    Args:
        no_dist: read in this process alone, without a process group; else all ranks call this.

    Raises:
        DataFileError: a file is missing or damaged, or holds something else than numbers, texts and tensors. Tensors
            may have been overwritten.
    """
    try:
        load(state, storage_reader=_Reader(folder), planner=_Planner(), no_dist=no_dist)
    except CheckpointException as error:  # on all ranks, whatever damaged bytes led to on one of them
        first, _ = next(iter(error.failures.values()))
        if isinstance(first, DataFileError) and str(folder) in str(first):
            raise first from error
        reason = (str(first).strip().splitlines() or [type(first).__name__])[0]
        raise DataFileError(f"{folder}: a file is missing or damaged ({reason}); copy it again") from error
