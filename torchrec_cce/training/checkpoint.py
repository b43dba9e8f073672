"""The checkpoints of a run: a folder each with weights, optimizer state, maps and position, read and written here."""

import copy
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_saver import save
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from torchrec_cce.errors import ConfigError, MapFileError
from torchrec_cce.files.atomic import atomic_path, write_json
from torchrec_cce.files.cache import scratch_copy
from torchrec_cce.maps.bundle import read_folder, write_folder
from torchrec_cce.maps.manifest import Provenance
from torchrec_cce.maps.residency_files import read_residencies, write_residencies
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.modules.snapshots import snapshot_of
from torchrec_cce.sharding.agreement import on_all_ranks
from torchrec_cce.sharding.distributed_checkpoint import load_checkpoint
from torchrec_cce.sharding.frequencies import ShardedFrequencies
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
        The position; and table → how often each ID was trained on, memory-mapped, for the tables that have counts.

    Raises:
        ConfigError: there is no checkpoint, or another optimizer trained it.
        MapFileError, MapMismatchError: its maps are missing, damaged or of another model.
    """
    folder = newest(run_dir)
    frequencies: dict[str, Integers] = {}
    for path, collection in collections_of(model).items():
        tables = read_maps(folder, path)
        collection.restore(tables)
        frequencies |= {name: each for name, table in tables.items() if (each := table.frequencies) is not None}
        if collection.remap.resident_tables():
            for name, residency in read_residencies(residents_folder(folder, path)).items():
                collection.remap.attach_residency(name, residency)
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


def exists(run_dir: Path) -> bool:
    """Whether a run has a checkpoint."""
    return bool(_all(run_dir))


def _all(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob(f"{_PREFIX}*"))


def write_position(folder: Path, position: Position) -> None:
    write_json(folder / POSITION, position)


def read_position(folder: Path) -> Position:
    """The position that the checkpoint `folder` was written at."""
    return Position.from_json((folder / POSITION).read_text())


def maps_folder(folder: Path, collection: str) -> Path:
    """Where the checkpoint `folder` has the maps of one collection."""
    return folder / "maps" / collection


def residents_folder(folder: Path, collection: str) -> Path:
    """Where the checkpoint `folder` has the residents of one collection, if it has tables with residents."""
    return folder / "residents" / collection


def read_maps(folder: Path, collection: str) -> dict[str, TableSnapshot]:
    """The maps of one collection in the checkpoint `folder`, with the frequencies of their IDs, verified and mapped.

    Raises:
        MapFileError: the maps are missing or damaged.
    """
    try:
        _, tables = read_folder(maps_folder(folder, collection))
    except FileNotFoundError as error:
        raise MapFileError(f"{error.filename}: no such file; copy the checkpoint again, with its maps") from error
    return tables


class _Pending(NamedTuple):
    """A checkpoint that is being written."""

    commit: ExitStack
    """Closing it gives the folder its name, on rank 0."""
    work: Future[None]


class CheckpointWriter:
    """Writes checkpoints, and removes the older one once the new one is whole. Every rank calls every method.

    A folder gets its name by a rename when all ranks have written, so that a kill at any moment leaves a whole one.

    Args:
        in_background: copy weights and optimizer state in memory and frequencies to a file, write them while training
            goes on, and give the folder its name when the next checkpoint is due, or at the end.
    """

    def __init__(self, run_dir: Path, *, in_background: bool = False) -> None:
        self._run_dir = run_dir
        self._in_background = in_background
        # The batches' collectives must not meet those of the writers.
        self._group = dist.new_group(backend="gloo") if in_background else None
        self._thread = ThreadPoolExecutor(1)
        self._pending: _Pending | None = None

    def save(
        self,
        model: DistributedModelParallel,
        optimizer: CombinedOptimizer,
        position: Position,
        frequencies: ShardedFrequencies,
    ) -> Path:
        """Write a checkpoint. Returns its folder, whole or to be.

        Raises:
            OSError: on all ranks, as `finish` raises it, or because there is no room for a copy.
        """
        self.finish()
        first = dist.get_rank() == 0
        folder = self._run_dir / "checkpoints" / f"{_PREFIX}{position.step:010d}"
        if folder.exists():  # nothing was trained since, but an epoch may have ended and its evaluation been the best
            if first:
                write_position(folder, position)
            return folder
        counted = frequencies.totals()
        if self._in_background:
            counted = on_all_ranks(lambda: {n: scratch_copy(each) for n, each in counted.items()} if first else {})
        commit = ExitStack()
        shared = [str(commit.enter_context(atomic_path(folder))) if first else ""]
        dist.broadcast_object_list(shared, src=0)
        temporary = Path(shared[0])
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        if self._in_background:
            state = copy.deepcopy(state)  # torch's own stager of asynchronous saves knows no sharded tensors
        rest = _rest(temporary, model, position, counted) if first else None

        def write() -> None:
            save(state, checkpoint_id=temporary, process_group=self._group)
            if rest is not None:
                rest()

        self._pending = _Pending(commit, self._thread.submit(write))
        if not self._in_background:
            self.finish()
        return folder

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one.

        Raises:
            OSError: on all ranks, if one of them could not write its part; the older checkpoint is still there.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        with pending.commit:
            on_all_ranks(pending.work.result)
        if dist.get_rank() == 0:
            left_by_kills = (self._run_dir / "checkpoints").glob(f".{_PREFIX}*")
            for old in (*_all(self._run_dir)[:-1], *left_by_kills):
                shutil.rmtree(old)
        dist.barrier()


def _rest(
    folder: Path, model: DistributedModelParallel, position: Position, frequencies: Mapping[str, Integers]
) -> Callable[[], None]:
    """A function that writes what the distributed checkpoint lacks: maps, frequencies and position, as they are now."""
    maps = {
        path: {
            table.name: snapshot_of(table, collection.pointer_map(table.name), frequencies=frequencies.get(table.name))
            for table in collection.cce_configs()
        }
        for path, collection in collections_of(model).items()
    }
    residents = {
        path: {table: collection.remap.residency(table) for table in collection.remap.resident_tables()}
        for path, collection in collections_of(model).items()
    }
    at = copy.deepcopy(position)

    def write() -> None:
        for path, residencies in residents.items():
            if residencies:
                write_residencies(residents_folder(folder, path), residencies)
        for path, tables in maps.items():
            write_folder(maps_folder(folder, path), tables, provenance=Provenance.of_this_code())
        write_position(folder, at)

    return write
