"""Checkpoints of a run: weights, optimizer state, maps and position in one folder that is there whole or not at all."""

import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from torchrec_cce.atomic import atomic_path
from torchrec_cce.errors import ConfigError, MapFileError
from torchrec_cce.maps.files import read_pointer_map, write_pointer_map
from torchrec_cce.sharding.recluster import collections_of
from torchrec_cce.training.position import Position

_PREFIX = "step-"
_POSITION = "position.json"


def save(
    run_dir: Path,
    model: DistributedModelParallel,
    optimizer: CombinedOptimizer,
    position: Position,
    frequencies: dict[str, npt.NDArray[np.int64]],
) -> Path:
    """Write a checkpoint and remove the one before. Every rank calls it; rank 0 gives `frequencies` of all ranks.

    The folder gets its name by a rename when all ranks have written, so that a kill at any moment leaves a whole one.
    """
    first = dist.get_rank() == 0
    folder = run_dir / "checkpoints" / f"{_PREFIX}{position.step:010d}"
    if folder.exists():  # nothing was trained since, but an epoch may have ended and its evaluation been the best
        if first:
            with atomic_path(folder / _POSITION) as temporary:
                temporary.write_text(position.to_json())
        return folder
    with atomic_path(folder) if first else nullcontext(folder) as temporary:
        shared = [str(temporary)]
        dist.broadcast_object_list(shared, src=0)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save_distributed(state, checkpoint_id=shared[0])
        if first:
            for path, collection in collections_of(model).items():
                for table in collection.cce_tables():
                    write_pointer_map(_map_path(temporary, path, table), collection.pointer_map(table))
            if frequencies:
                np.savez(temporary / "frequencies.npz", **frequencies)  # type: ignore[arg-type]
            (temporary / _POSITION).write_text(position.to_json())
    if first:
        left_by_kills = (run_dir / "checkpoints").glob(f".{_PREFIX}*")
        for old in (*_all(run_dir)[:-1], *left_by_kills):
            shutil.rmtree(old)
    dist.barrier()
    return folder


def load(
    run_dir: Path, model: DistributedModelParallel, optimizer: CombinedOptimizer
) -> tuple[Position, dict[str, npt.NDArray[np.int64]]]:
    """Read the newest checkpoint of a run into `model` and `optimizer`, on any number of ranks.

    The maps are attached first, so that weights and maps are compared before a weight is overwritten.

    Raises:
        ConfigError: there is no checkpoint.
        MapFileError, MapMismatchError: its maps are missing, damaged or of another model.
    """
    checkpoints = _all(run_dir)
    if not checkpoints:
        raise ConfigError(
            f"{run_dir}: no checkpoint; one is written every training.checkpoint_every batches, on Ctrl-C and at the "
            "end. Remove the folder and start again"
        )
    folder = checkpoints[-1]
    for path, collection in collections_of(model).items():
        for table in collection.cce_tables():
            file = _map_path(folder, path, table)
            if not file.exists():
                raise MapFileError(f"{file}: no such file; copy the checkpoint again, with its maps")
            collection.attach_pointer_map(table, read_pointer_map(file))
    for _, part in optimizer.optimizers:
        if isinstance(part, KeyedOptimizerWrapper):
            part.init_state()  # a state that was never stepped has no entries to load into
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    load_distributed(state, checkpoint_id=str(folder))
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    position = Position.from_json((folder / _POSITION).read_text())
    counts = folder / "frequencies.npz"
    return position, dict(np.load(counts)) if counts.exists() else {}


def exists(run_dir: Path) -> bool:
    """Whether a run has a checkpoint."""
    return bool(_all(run_dir))


def _all(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob(f"{_PREFIX}*"))


def _map_path(folder: Path, collection: str, table: str) -> Path:
    return folder / "maps" / f"{collection}.{table}.arrow"
