"""Checkpoints of a run: weights, optimizer state, maps and position in one folder; what is in it and how it is read."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from torchrec_cce.errors import ConfigError, MapFileError
from torchrec_cce.files.atomic import write_json
from torchrec_cce.maps.bundle import read_folder
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.modules.collection import CCECollection, snapshot_of
from torchrec_cce.sharding.reshard import load_checkpoint
from torchrec_cce.sharding.tables import collections_of
from torchrec_cce.training.schedule import Position

_PREFIX = "step-"
POSITION = "position.json"

Integers = npt.NDArray[np.int64]


def load(
    run_dir: Path, model: DistributedModelParallel, optimizer: CombinedOptimizer
) -> tuple[Position, dict[str, Integers]]:
    """Read the newest checkpoint of a run into `model` and `optimizer`, on any number of ranks.

    The maps are attached first, so that weights and maps are compared before a weight is overwritten.

    Returns:
        The position; and table → how often each ID was trained on, memory-mapped, of the tables where that was counted.

    Raises:
        ConfigError: there is no checkpoint, or it is of another optimizer.
        MapFileError, MapMismatchError: its maps are missing, damaged or of another model.
    """
    folder = newest(run_dir)
    frequencies: dict[str, Integers] = {}
    for path, collection in collections_of(model).items():
        tables = read_maps(folder, path)
        collection.restore(tables)
        frequencies |= {name: each for name, table in tables.items() if (each := table.frequencies) is not None}
    load_checkpoint(folder, model, optimizer)
    return read_position(folder), frequencies


def newest(run_dir: Path) -> Path:
    """The folder of a run's newest checkpoint. Raises ConfigError if there is none."""
    checkpoints = _all(run_dir)
    if not checkpoints:
        raise ConfigError(
            f"{run_dir}: no checkpoint; one is written every training.checkpoint_every batches, on Ctrl-C and at the "
            "end. Remove the folder and start again"
        )
    return checkpoints[-1]


def folder_of(run_dir: Path, step: int) -> Path:
    """The folder of the checkpoint after so many batches."""
    return run_dir / "checkpoints" / f"{_PREFIX}{step:010d}"


def superseded(run_dir: Path) -> list[Path]:
    """All checkpoints but the newest, and what kills have left of others."""
    return [*_all(run_dir)[:-1], *(run_dir / "checkpoints").glob(f".{_PREFIX}*")]


def write_position(folder: Path, position: Position) -> None:
    write_json(folder / POSITION, position)


def read_position(folder: Path) -> Position:
    """The position that the checkpoint `folder` was written at."""
    return Position.from_json((folder / POSITION).read_text())


def read_maps(folder: Path, collection: str) -> dict[str, TableSnapshot]:
    """The maps of one collection in the checkpoint `folder`, with the frequencies of their IDs, verified and mapped.

    Raises:
        MapFileError: they are missing or damaged.
    """
    try:
        _, tables = read_folder(maps_folder(folder, collection))
    except FileNotFoundError as error:
        raise MapFileError(f"{error.filename}: no such file; copy the checkpoint again, with its maps") from error
    return tables


def exists(run_dir: Path) -> bool:
    """Whether a run has a checkpoint."""
    return bool(_all(run_dir))


def _all(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob(f"{_PREFIX}*"))


def maps_folder(folder: Path, collection: str) -> Path:
    """Where the checkpoint `folder` has the maps of one collection."""
    return folder / "maps" / collection


def map_snapshots(collection: CCECollection, frequencies: Mapping[str, Integers]) -> dict[str, TableSnapshot]:
    """Maps and the frequencies of their IDs: the weights are in the distributed checkpoint."""
    return {
        table.name: snapshot_of(table, collection.pointer_map(table.name), frequencies=frequencies.get(table.name))
        for table in collection.cce_configs()
    }
