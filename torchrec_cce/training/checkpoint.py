"""Checkpoints of a run: weights, optimizer state, maps and position in one folder that is there whole or not at all."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from torchrec_cce.atomic import atomic_path
from torchrec_cce.errors import ConfigError
from torchrec_cce.maps.files import read_pointer_map, write_pointer_map
from torchrec_cce.sharding.recluster import collections_of
from torchrec_cce.training.schedule import EarlyStopping

_PREFIX = "step-"


@dataclass(kw_only=True)
class Position:
    """How far a run has come."""

    step: int = 0
    """Batches trained."""
    epoch: int = 0
    batch: int = 0
    """Batches of the current epoch trained."""
    best: dict[str, float] | None = None
    """The evaluation with the lowest validation BCE, and the test split at that moment."""
    stopping: EarlyStopping = field(default_factory=EarlyStopping)


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
    if folder.exists():  # nothing was trained since
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
            (temporary / "position.json").write_text(json.dumps(asdict(position)))
    if first:
        for old in _all(run_dir)[:-1]:
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
        MapFileError, MapMismatchError: its maps are damaged or of another model.
    """
    checkpoints = _all(run_dir)
    if not checkpoints:
        raise ConfigError(f"{run_dir}: no checkpoint; was a run with this folder ever started?")
    folder = checkpoints[-1]
    for path, collection in collections_of(model).items():
        for table in collection.cce_tables():
            collection.attach_pointer_map(table, read_pointer_map(_map_path(folder, path, table)))
    for _, part in optimizer.optimizers:
        if isinstance(part, KeyedOptimizerWrapper):
            part.init_state()  # a state that was never stepped has no entries to load into
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    load_distributed(state, checkpoint_id=str(folder))
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    values = json.loads((folder / "position.json").read_text())
    position = Position(**{**values, "stopping": EarlyStopping(**values["stopping"])})
    counts = folder / "frequencies.npz"
    return position, dict(np.load(counts)) if counts.exists() else {}


def _all(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob(f"{_PREFIX}*"))


def _map_path(folder: Path, collection: str, table: str) -> Path:
    return folder / "maps" / f"{collection}.{table}.arrow"
