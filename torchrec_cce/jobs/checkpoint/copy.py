"""A copy of a checkpoint in which the CCE tables are others. All the rest of it is copied as bytes and never loaded."""

import itertools
import pickle
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from torchrec_cce.errors import JobError
from torchrec_cce.files.atomic import atomic_path
from torchrec_cce.jobs.checkpoint.reader import METADATA, Checkpoint, CheckpointTable
from torchrec_cce.jobs.recluster.cluster import Clustered
from torchrec_cce.maps.bundle import write_folder
from torchrec_cce.maps.manifest import Provenance
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.modules.parameter_store import TableRows
from torchrec_cce.modules.remap import MapStamp
from torchrec_cce.training import checkpoint
from torchrec_cce.training.config_file import RUN_CONFIG
from torchrec_cce.training.log import METRICS

_RUN_FILES = (RUN_CONFIG, METRICS)


@dataclass(frozen=True, kw_only=True, eq=False)
class NewTable:
    """What takes the place of a table."""

    table: CheckpointTable
    pointer_map: PointerMap
    rows: TableRows
    entropies: tuple[float, ...]

    @classmethod
    def of(cls, table: CheckpointTable, clustered: Clustered) -> "NewTable":
        return cls(
            table=table,
            pointer_map=clustered.pointer_map,
            rows=clustered.rows,
            entropies=clustered.report.entropies,
        )


def copy_checkpoint(found: Checkpoint, source: Path, target: Path) -> Checkpoint:
    """Copy a checkpoint to the new folder `target`; of the run `source`, it and what resuming needs.

    Raises:
        JobError: it was removed meanwhile, by a run that goes on training.
        OSError: there is no room.
    """
    try:
        if found.folder == source:
            shutil.copytree(source, target)
        else:
            shutil.copytree(found.folder, target / found.folder.relative_to(source))
            for name in _RUN_FILES:
                if (source / name).exists():
                    shutil.copyfile(source / name, target / name)
    except (shutil.Error, FileNotFoundError) as error:
        if not found.folder.exists():
            raise JobError(
                f"{found.folder}: a newer checkpoint took its place while it was copied; run the job again"
            ) from error
        # `copytree` goes on after an error and lists all in the end.
        raise OSError(error.args[0][0][2] if isinstance(error, shutil.Error) else str(error)) from error
    return Checkpoint.at(target, use_helper=found.helper_use.of_tables)


def replace_tables(copy: Checkpoint, tables: Sequence[NewTable], *, version: int) -> Checkpoint:
    """Write new maps, weights and states over those of `copy`, a checkpoint that nobody else reads yet.

    Args:
        tables: all CCE tables.
        version: the registry's, of which the new weights say that they belong to it.

    Returns:
        The checkpoint as it is then.
    """
    tensors = {}
    for one in tables:
        tensors[one.table.weight] = torch.from_numpy(one.rows.weights)
        tensors |= {key: torch.from_numpy(one.rows.states[name]) for name, key in one.table.states.items()}
    _replace_tensors(copy, tensors | _stamps(tables, version))
    if copy.has_maps:
        for path in copy.stamps:
            folder = checkpoint.maps_folder(copy.folder, path)
            shutil.rmtree(folder)
            mine = {one.table.name: one for one in tables if one.table.collection == path}
            maps = {name: replace(one.table.snapshot, pointer_map=one.pointer_map) for name, one in mine.items()}
            write_folder(folder, maps, provenance=Provenance.of_this_code())
    _note_in_position(copy, tables, version)
    # A clustering has left no state of a helper that would tell.
    of_tables = {one.table.name: one.table.config.use_helper for one in tables}
    return Checkpoint(folder=copy.folder, helper_use=replace(copy.helper_use, of_tables=of_tables))


def stamp_version(copy: Checkpoint, tables: Sequence[NewTable], *, version: int) -> None:
    """Have the weights in `copy`, after `replace_tables`, say that they belong to another version."""
    _replace_tensors(copy, _stamps(tables, version))
    _note_in_position(copy, tables, version)


def _note_in_position(copy: Checkpoint, tables: Sequence[NewTable], version: int) -> None:
    if not (copy.folder / checkpoint.POSITION).exists():
        return
    position = checkpoint.read_position(copy.folder)
    position.entropies |= {one.table.name: one.entropies for one in tables}
    if position.version is not None:
        position.version = version
    checkpoint.write_position(copy.folder, position)


def _stamps(tables: Sequence[NewTable], version: int) -> dict[str, torch.Tensor]:
    """Name of each collection's extra state → its value."""
    stamps: dict[str, list[MapStamp]] = {}
    for one in tables:
        key = ".".join(filter(None, ["model", one.table.collection, "remap._extra_state"]))
        stamps.setdefault(key, []).append(MapStamp.of(one.pointer_map)._replace(version=version))
    return {key: MapStamp.to_tensor(each) for key, each in stamps.items()}


def _replace_tensors(copy: Checkpoint, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write `tensors` to one more file, and have the index name it. What they were before stays in its file, unread."""
    folder, metadata = copy.folder, copy.metadata
    before: dict[str, Any] = dict(metadata.state_dict_metadata)
    with TemporaryDirectory(dir=folder) as part:
        try:
            save(
                {key: tensor.to(before[key].properties.dtype) for key, tensor in tensors.items()},
                checkpoint_id=part,
                no_dist=True,
            )
        except CheckpointException as error:  # what PyTorch makes of a full disk
            raise _os_error_in(error) from error
        added = FileSystemReader(part).read_metadata()
        (file,) = {one.relative_path for one in added.storage_data.values()}  # one process writes one
        name = next(name for i in itertools.count() if not (folder / (name := f"__recluster_{i}.distcp")).exists())
        (Path(part) / file).rename(folder / name)
    entries: dict[str, Any] = added.state_dict_metadata
    metadata.state_dict_metadata |= {
        key: replace(entry, properties=before[key].properties) for key, entry in entries.items()
    }
    metadata.storage_data = {index: one for index, one in metadata.storage_data.items() if index.fqn not in tensors} | {
        index: replace(one, relative_path=name) for index, one in added.storage_data.items()
    }
    with atomic_path(folder / METADATA) as temporary:
        temporary.write_bytes(pickle.dumps(metadata))


def _os_error_in(error: CheckpointException) -> OSError:
    """What the operating system said, if it was that which led to `error`."""
    first, _ = next(iter(error.failures.values()))
    found: BaseException | None = first
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    return found or OSError(f"the new tables cannot be written: {first}")
