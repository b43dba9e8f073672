"""A copy of a checkpoint with other CCE tables. Everything else in it is copied as bytes and never loaded."""

import itertools
import pickle
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from torchrec_cce.errors import JobError
from torchrec_cce.files.atomic import atomic_path
from torchrec_cce.jobs.checkpoint.reader import CCECheckpoint, CheckpointTable
from torchrec_cce.jobs.recluster.cluster import Clustered
from torchrec_cce.maps.bundle import write_folder
from torchrec_cce.maps.manifest import Provenance
from torchrec_cce.maps.residency_files import write_residencies
from torchrec_cce.modules.map_stamp import NAMELESS, MapStamp
from torchrec_cce.modules.state_names import stamps_of
from torchrec_cce.sharding.checkpoint_index import METADATA, read_index
from torchrec_cce.sharding.digests import renew_digests
from torchrec_cce.training import checkpoint
from torchrec_cce.training.config_file import RUN_CONFIG
from torchrec_cce.training.metrics import METRICS

_RUN_FILES = (RUN_CONFIG, METRICS)


class NewTable(NamedTuple):
    """A table of the checkpoint, and what became of it."""

    table: CheckpointTable
    clustered: Clustered


def copy_checkpoint(found: CCECheckpoint, source: Path, target: Path) -> CCECheckpoint:
    """Copy a checkpoint to the new folder `target`.

    Args:
        found: the checkpoint.
        source: its folder, or that of the run that it is the newest checkpoint of; then `target` becomes a run with
            this checkpoint alone and what is needed to resume from it.

    Raises:
        JobError: a run that goes on training removed the checkpoint meanwhile.
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
    return CCECheckpoint.at(target, use_helper=found.helper_use.of_tables)


def replace_tables(copy: CCECheckpoint, tables: Sequence[NewTable], *, version: int) -> CCECheckpoint:
    """Replace maps, weights and optimizer states in `copy`, a checkpoint that nobody else reads yet. The phases of
    residents end in it; their rows stay, and mean nothing any more.

    Args:
        tables: all CCE tables.
        version: the number of the registry's version that the new weights are stamped with.

    Returns:
        The changed checkpoint.
    """
    tensors = {}
    for new in tables:
        tensors[new.table.weight] = torch.from_numpy(new.clustered.rows.weights)
        tensors |= {key: torch.from_numpy(new.clustered.rows.states[name]) for name, key in new.table.states.items()}
    _replace_tensors(copy, tensors | _stamps(copy, tables, version))
    if copy.has_maps:
        for path in copy.stamps:
            folder = checkpoint.maps_folder(copy.folder, path)
            shutil.rmtree(folder)
            maps = {
                new.table.name: replace(new.table.snapshot, pointer_map=new.clustered.pointer_map)
                for new in tables
                if new.table.collection == path
            }
            write_folder(folder, maps, provenance=Provenance.of_this_code())
    for path in {new.table.collection for new in tables if new.table.residents is not None}:
        folder = checkpoint.residents_folder(copy.folder, path)
        residencies = copy.residencies(path)  # mapped: they are there still
        shutil.rmtree(folder)
        write_residencies(folder, {name: residency.closed() for name, residency in residencies.items()})
    _note_in_position(copy, tables, version)
    renew_digests(copy.folder)
    # The states of the new helpers are zero and no longer tell whether they are used, so that it is said here.
    of_tables = {new.table.name: new.table.config.use_helper for new in tables}
    return CCECheckpoint(folder=copy.folder, helper_use=replace(copy.helper_use, of_tables=of_tables))


def stamp_version(copy: CCECheckpoint, tables: Sequence[NewTable], *, version: int) -> None:
    """After `replace_tables`, stamp the weights in `copy` with the number of another version."""
    _replace_tensors(copy, _stamps(copy, tables, version))
    _note_in_position(copy, tables, version)
    renew_digests(copy.folder)


def _note_in_position(copy: CCECheckpoint, tables: Sequence[NewTable], version: int) -> None:
    if not (copy.folder / checkpoint.POSITION).exists():
        return
    position = checkpoint.read_position(copy.folder)
    position.entropies |= {new.table.name: new.clustered.report.entropies for new in tables}
    if position.version is not None:
        position.version = version
    checkpoint.write_position(copy.folder, position)


def _stamps(copy: CCECheckpoint, tables: Sequence[NewTable], version: int) -> dict[str, torch.Tensor]:
    """Key of each collection's stamps → the new ones; with the names of tables where the old ones had them."""
    stamps: dict[str, list[MapStamp]] = {}
    for new in tables:
        stamp = MapStamp.of(new.table.name, new.clustered.pointer_map)._replace(version=version)
        if not all(old.is_named for old in copy.stamps[new.table.collection]):
            stamp = stamp._replace(table=NAMELESS)
        stamps.setdefault(stamps_of(new.table.collection), []).append(stamp)
    return {key: MapStamp.to_tensor(each) for key, each in stamps.items()}


def _replace_tensors(copy: CCECheckpoint, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write `tensors` to one more file and point the index to it. Their old values stay in the old files, unread."""
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
        added = read_index(Path(part))
        (file,) = {stored.relative_path for stored in added.storage_data.values()}  # one process writes one file
        name = next(name for i in itertools.count() if not (folder / (name := f"__recluster_{i}.distcp")).exists())
        (Path(part) / file).rename(folder / name)
    entries: dict[str, Any] = added.state_dict_metadata
    metadata.state_dict_metadata |= {
        key: replace(entry, properties=before[key].properties) for key, entry in entries.items()
    }
    kept = {index: stored for index, stored in metadata.storage_data.items() if index.fqn not in tensors}
    metadata.storage_data = kept | {
        index: replace(stored, relative_path=name) for index, stored in added.storage_data.items()
    }
    with atomic_path(folder / METADATA) as temporary:
        temporary.write_bytes(pickle.dumps(metadata))


def _os_error_in(error: CheckpointException) -> OSError:
    """The operating system's error that led to `error`, or a new one if there was none."""
    first, _ = next(iter(error.failures.values()))
    found: BaseException | None = first
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    return found or OSError(f"the new tables cannot be written: {first}")
