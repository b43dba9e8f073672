"""A model in a folder, its weights with the maps that they need: for models that are not sharded."""

from pathlib import Path

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from torchrec_cce.errors import ConfigError, MapFileError
from torchrec_cce.files.atomic import atomic_path
from torchrec_cce.maps.residency_files import read_residencies
from torchrec_cce.modules.collection import CCECollection
from torchrec_cce.modules.lost_maps import maps_cared_for
from torchrec_cce.sharding.digests import check_digests, digests_of, write_digests
from torchrec_cce.training.checkpoint import maps_writer, read_maps, residents_folder

WEIGHTS = "weights.pt"


def save_model(model: nn.Module, folder: str | Path) -> None:
    """Write `model.state_dict()`, and beside it the maps and residents of all CCE tables, to a new folder.

    The folder appears whole or not at all.

    Args:
        model: a collection, or a model that has some in it.

    Raises:
        ConfigError: tables are sharded; publish their maps, and save weights by `torch.distributed.checkpoint`.
        OSError: the folder is there already, or there is no room.
    """
    with maps_cared_for():
        state = model.state_dict()
    if any(isinstance(value, ShardedTensor) for value in state.values()):
        raise ConfigError(
            "tables of the model are sharded; publish its maps (Registry.publish(ShardedMaps(model).snapshot())) and "
            "save its weights by torch.distributed.checkpoint"
        )
    with atomic_path(Path(folder)) as part:
        part.mkdir()
        torch.save(state, part / WEIGHTS)
        known = maps_writer(part, _collections(model), {})()
        write_digests(part, digests_of(part, known), {})


def load_model(model: nn.Module, folder: str | Path) -> None:
    """Take over what `save_model` wrote: maps, residents and weights.

    Raises:
        MapFileError: a file is missing or damaged.
        MapMismatchError: the maps are of other tables than the model has. Nothing has changed.
    """
    folder = Path(folder)
    collections = _collections(model)
    maps = {path: read_maps(folder, path) for path in collections}
    try:
        check_digests(folder, None)
        state = torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever damaged bytes lead to
        raise MapFileError(f"{folder / WEIGHTS}: missing or damaged ({error}); copy the folder again") from error
    for path, collection in collections.items():
        collection.check_tables(maps[path])
    for path, collection in collections.items():
        collection.restore(maps[path])
        if collection.remap.resident_tables():
            for table, residency in read_residencies(residents_folder(folder, path)).items():
                collection.remap.attach_residency(table, residency)
    model.load_state_dict(state)


def _collections(model: nn.Module) -> dict[str, CCECollection]:
    """Those that have maps, by their paths."""
    found = {path: module for path, module in model.named_modules() if isinstance(module, CCECollection)}
    return {path: collection for path, collection in found.items() if collection.cce_tables()}
