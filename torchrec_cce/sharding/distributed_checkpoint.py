"""A distributed checkpoint: some whole tensors of it, or all of it loaded into a model under any placement."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper, OptimizerWrapper

from torchrec_cce.errors import ConfigError, DataFileError
from torchrec_cce.files.cache import reserve
from torchrec_cce.modules.lost_maps import maps_cared_for
from torchrec_cce.modules.state_names import optimizer_state, split_weight, stamps_of
from torchrec_cce.sharding.agreement import from_each_rank
from torchrec_cce.sharding.checkpoint_index import read_index
from torchrec_cce.sharding.checkpoint_reader import read_into
from torchrec_cce.sharding.tables import collections_of, scatter, size_of

_KEPT_TYPES = {torch.int8: np.int8, torch.float16: np.float16}
_PIECE_BYTES = 1 << 22
_FUSED, _REPLICATED = "momentum1", "sum"
"""What FBGEMM's fused kernels and PyTorch's and TorchRec's Adagrads call one and the same accumulator."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DistributedCheckpoint:
    """A checkpoint `{"model": …, "optimizer": …}`, whatever the ranks and the sharding that it is of.

    It is read in this process alone, without a process group; see `load_checkpoint` for a model on many ranks.
    """

    folder: Path

    @cached_property
    def metadata(self) -> Metadata:
        """The index of its tensors. Raises DataFileError if it is missing or damaged."""
        return read_index(self.folder)

    @property
    def num_bytes(self) -> int:
        """Of all its files."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    @property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Key of each tensor → its size and type."""
        entries = self.metadata.state_dict_metadata
        return {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}

    def bytes_of(self, keys: Sequence[str]) -> int:
        """Of some whole tensors."""
        entries = [_entry(self.folder, self.tensors, key) for key in keys]
        return sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in entries)

    def read(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        """Whole tensors, in their own types; nothing else is loaded. Raises DataFileError if a file is damaged."""
        whole = {key: _room_for(self.folder, self.tensors, key) for key in keys}
        if whole:
            self.fill(whole)
        return whole

    def copy_rows(self, key: str, path: Path) -> npt.NDArray[Any]:
        """Write a matrix to the new file `path`, and map it for reading. Nothing of its size is held in memory.

        Returns:
            `[m, d]`: int8 and float16 as they are; other types as float32.

        Raises:
            DataFileError: a file is damaged.
            OSError: there is no room for the matrix, and for the largest of its stored parts meanwhile.
        """
        entry = _entry(self.folder, self.tensors, key)
        kind = np.dtype(_KEPT_TYPES.get(entry.properties.dtype, np.float32))
        with path.open("xb") as file:
            reserve(file, entry.size.numel() * kind.itemsize)
        whole = np.memmap(path, kind, "r+", shape=tuple(entry.size))
        for index, stored in self.metadata.storage_data.items():
            if index.fqn == key:
                part = self._mapped(self.folder / stored.relative_path, stored.offset, stored.length, path)
                first = index.offset or torch.Size([0] * part.dim())
                region = tuple(slice(start, start + size) for start, size in zip(first, part.shape, strict=True))
                whole[region] = part.numpy()
        whole.flags.writeable = False
        return whole

    def _mapped(self, file: Path, offset: int, length: int, beside: Path) -> torch.Tensor:
        """A tensor that lies among others in `file`, memory-mapped from a copy that has no name any more."""
        copy = beside.with_name(beside.name + ".part")
        try:
            with file.open("rb") as source, copy.open("xb") as target:
                source.seek(offset)
                while length and (piece := source.read(min(length, _PIECE_BYTES))):
                    length -= target.write(piece)
            with ZipFile(copy) as archive:
                damaged = archive.testzip()
            if length or damaged is not None:
                raise DataFileError(f"{file}: cut short or damaged; copy the checkpoint again")
            part: torch.Tensor = torch.load(copy, map_location="cpu", weights_only=True, mmap=True)
            return part
        except (DataFileError, OSError) as error:
            if not isinstance(error, FileNotFoundError):
                raise
            raise DataFileError(f"{file}: missing; copy the checkpoint again") from error
        except Exception as error:  # whatever damaged bytes lead to
            raise DataFileError(f"{file}: missing or damaged ({error}); copy the checkpoint again") from error
        finally:
            copy.unlink(missing_ok=True)

    def fill(self, state: dict[str, Any]) -> None:
        """Read into the tensors of `state`, which may be nested. Raises DataFileError if a file is damaged."""
        read_into(state, self.folder, no_dist=True)


def load_checkpoint(folder: Path, model: DistributedModelParallel, optimizer: KeyedOptimizer) -> None:
    """Read what was saved as `{"model": model.state_dict(), "optimizer": optimizer.state_dict()}`.

    Every rank calls it. The number of ranks and the placement of each table may differ from those of the checkpoint.
    TorchRec carries a table over between placements by rows and by ranks. Adagrad's state of a replicated table has
    another name and shape, and is converted here.

    Raises:
        MapMismatchError: its weights were trained with other maps than those attached. Nothing has changed.
        ConfigError: the checkpoint lacks state that the optimizer needs, because another optimizer trained it.
        DataFileError: a file is missing or damaged.
    """
    saved = read_index(folder).state_dict_metadata
    _compare_maps(folder, model, saved)
    _init_state(optimizer)
    with maps_cared_for():
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    wanted: dict[str, dict[str, Any]] = state["optimizer"]["state"]
    there = {
        weight: {name: value for name, value in entries.items() if optimizer_state(weight, name) in saved}
        for weight, entries in wanted.items()
    }
    renamed = {
        (weight, name): optimizer_state(weight, _other_name(weight, name))
        for weight, entries in wanted.items()
        for name in entries.keys() - there[weight].keys()
    }
    _check(renamed, saved.keys())

    # An empty dictionary is looked for under its own name, which a checkpoint of another placement does not have.
    loaded = {**state["optimizer"], "state": {weight: entries for weight, entries in there.items() if entries}}
    filled = {"optimizer": loaded} if any(loaded.values()) else {}
    read_into({"model": state["model"], **filled}, folder)
    everyones = from_each_rank([key for key in renamed.values() if key in saved])
    whole = {key: _room_for(folder, saved, key) for key in sorted({key for keys in everyones for key in keys})}
    if whole:
        read_into(whole, folder)
    for (weight, name), key in renamed.items():
        if key in whole:
            value = wanted[weight][name]
            scatter(value, whole[key].reshape(size_of(value)))
    for weight, entries in there.items():
        wanted[weight].update(entries)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])


def _entry(folder: Path, entries: Mapping[str, Any], key: str) -> TensorStorageMetadata:
    """What an index says of a tensor. Raises DataFileError if there is none."""
    entry = entries.get(key)
    if not isinstance(entry, TensorStorageMetadata):
        raise DataFileError(f"{folder}: has no tensor {key!r}; the checkpoint is of another model, or damaged")
    return entry


def _room_for(folder: Path, entries: Mapping[str, Any], key: str) -> torch.Tensor:
    """A tensor to read another one into. Raises DataFileError if there is none, or one of an impossible size."""
    entry = _entry(folder, entries, key)
    try:
        return torch.empty(entry.size, dtype=entry.properties.dtype)
    except RuntimeError as error:
        raise DataFileError(f"{folder}: no room for the tensor {key!r} of size {list(entry.size)}") from error


def _init_state(optimizer: KeyedOptimizer) -> None:
    """A state that was never stepped has no entries to load into; that of fused kernels is there from the start."""
    inner = optimizer
    while isinstance(inner, OptimizerWrapper):
        inner = inner._optimizer
    if isinstance(inner, CombinedOptimizer):
        for _, part in inner.optimizers:
            _init_state(part)
    elif isinstance(inner, KeyedOptimizerWrapper):
        optimizer.init_state()


def _compare_maps(folder: Path, model: DistributedModelParallel, saved: Mapping[str, Any]) -> None:
    """Before weights are read in place."""
    collections = {stamps_of(path): collection for path, collection in collections_of(model).items()}
    stamps = {key: _room_for(folder, saved, key) for key in collections if key in saved}
    if stamps:
        read_into(stamps, folder)
    for key, each in stamps.items():
        collections[key].remap.set_extra_state(each)


def _other_name(weight: str, name: str) -> str:
    """How the other placement calls an entry: `sum` of `….t_user.weight` is `t_user.momentum1` in a fused kernel."""
    if name == _REPLICATED:
        _, table = split_weight(weight)
        return f"{table}.{_FUSED}"
    return _REPLICATED if name.endswith(f".{_FUSED}") else name


def _check(renamed: dict[tuple[str, str], str], saved: Any) -> None:
    """Raise ConfigError if an entry is missing that matters.

    Adagrad's count of steps, which fused kernels lack, only serves a decay of the rate; it may start at zero.
    """
    converted = {weight for (weight, _), key in renamed.items() if key in saved}
    for (weight, name), key in renamed.items():
        if key not in saved and not (name == "step" and weight in converted):
            stem = optimizer_state(weight, "")
            has = sorted(other.removeprefix(stem) for other in saved if other.startswith(stem)) or "nothing"
            raise ConfigError(
                f"the checkpoint has no {name!r} of the optimizer for {weight!r}, but {has}; it was trained with "
                "another optimizer. Train on with that one"
            )
