"""What a training run has come to, as a version to publish: the maps and weights of its newest checkpoint."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed

from torchrec_cce.errors import ConfigError
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.training import checkpoint
from torchrec_cce.training.config import config_digest
from torchrec_cce.training.config_file import read_run_config


@dataclass(frozen=True, kw_only=True)
class RunSnapshot:
    """The CCE tables of a run's newest checkpoint, and where they come from."""

    tables: dict[str, TableSnapshot]
    checkpoint: str
    config_digest: str
    """SHA-256 of the run's configuration."""


def snapshot_of_run(run_dir: Path) -> RunSnapshot:
    """Read maps, weights, frequencies and entropies of a run's newest checkpoint, whatever ranks wrote it.

    Raises:
        ConfigError: there is no run or no checkpoint, or the model has no CCE table.
        MapFileError: a map is missing or damaged.
    """
    config = read_run_config(run_dir)
    folder = checkpoint.newest(run_dir)
    entropies = checkpoint.read_position(folder).entropies
    tables = {}
    for collection in sorted(path.name for path in (folder / "maps").iterdir()):
        maps = checkpoint.read_maps(folder, collection)
        weights = _weights(folder, {name: f"{collection}.ebc.embedding_bags.{name}.weight" for name in maps})
        for name, table in maps.items():
            tables[name] = replace(table, weights=weights[name], entropies=entropies.get(name, ()))
    if not tables:
        raise ConfigError(f"{run_dir}: embedding.method={config.embedding.method!r} has no map to publish; cce has")
    return RunSnapshot(tables=tables, checkpoint=str(folder), config_digest=config_digest(config))


def _weights(folder: Path, names: dict[str, str]) -> dict[str, npt.NDArray[np.float32]]:
    """Table → its whole weights, from a distributed checkpoint of any sharding."""
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    # The checkpoint was written by this package: what stands under these names is tensors.
    whole = {f"model.{name}": torch.empty(saved[f"model.{name}"].size) for name in names.values()}  # type: ignore[union-attr]
    if whole:
        load_distributed(whole, checkpoint_id=str(folder), no_dist=True)
    return {table: whole[f"model.{name}"].numpy() for table, name in names.items()}
