"""The checkpoints of a run: a folder each with weights, optimizer state, maps and position, read and written here."""

import copy
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from torchrec_cce.errors import ConfigError, DataFileError, DivergedError, MapFileError
from torchrec_cce.files.atomic import atomic_path, json_text
from torchrec_cce.files.cache import scratch_copy
from torchrec_cce.maps.bundle import read_folder, write_folder
from torchrec_cce.maps.manifest import Provenance
from torchrec_cce.maps.residency_files import read_residencies, write_residencies
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.modules.collection import CCECollection
from torchrec_cce.modules.lost_maps import maps_cared_for
from torchrec_cce.modules.snapshots import snapshot_of
from torchrec_cce.sharding.agreement import from_all_ranks, on_all_ranks, on_first_rank
from torchrec_cce.sharding.checkpoint_index import METADATA
from torchrec_cce.sharding.digests import (
    DIGESTS,
    TENSORS,
    FileDigest,
    check_digests,
    digests_of,
    find_damage,
    read_digests,
    replace_file,
    write_digests,
)
from torchrec_cce.sharding.distributed_checkpoint import load_checkpoint
from torchrec_cce.sharding.frequencies import ShardedFrequencies
from torchrec_cce.sharding.hashing_writer import HashingWriter
from torchrec_cce.sharding.tables import collections_of
from torchrec_cce.training.config_file import RUN_CONFIG
from torchrec_cce.training.schedule import Position

_PREFIX = "step-"
POSITION = "position.json"

Integers = npt.NDArray[np.int64]


def load(
    run_dir: Path, model: DistributedModelParallel, optimizer: CombinedOptimizer
) -> tuple[Position, dict[str, Integers]]:
    """Read the newest checkpoint of a run into `model` and `optimizer`, on any number of ranks.

    Its files are compared with their digests first, a part of them on each rank. Then the maps are attached, so that
    weights and maps are compared before a weight is overwritten.

    Returns:
        The position; and table → how often each ID was trained on, memory-mapped, for the tables that have counts.

    Raises:
        ConfigError: there is no checkpoint, or another optimizer trained it.
        DataFileError: a file is missing or damaged.
        MapFileError, MapMismatchError: its maps are missing, damaged or of another model.
    """
    folder = newest(run_dir)
    ranks = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    on_all_ranks(lambda: check_digests(folder, run_dir, **ranks))
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


def newest_whole(run_dir: Path) -> Path:
    """The folder of a run's newest checkpoint, for one process, its files compared with their digests.

    Raises:
        ConfigError: there is none.
        DataFileError: a file is missing or damaged.
    """
    folder = newest(run_dir)
    check_digests(folder, run_dir)
    return folder


def damage_in(path: Path) -> list[str]:
    """What is wrong with each damaged file of the newest checkpoint of the run `path`, or of the checkpoint `path`.

    Raises:
        ConfigError: there is no checkpoint.
    """
    is_run = (path / "checkpoints").is_dir() or not (path / METADATA).exists()
    folder = newest(path) if is_run else path
    try:
        digests = read_digests(folder)
    except DataFileError as error:
        return [str(error)]
    if digests is None:
        return [f"{folder}: has no {DIGESTS}, which older versions did not write, so that it cannot be compared"]
    return find_damage(folder, digests, path if is_run else None)


def exists(run_dir: Path) -> bool:
    """Whether a run has a checkpoint."""
    return bool(_all(run_dir))


def _all(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob(f"{_PREFIX}*"))


def sweep(run_dir: Path) -> None:
    """Remove checkpoints that are not whole, and what else has no name yet: a run that was killed has left them.

    One that sleeps and wakes up later cannot give them their names any more.
    """
    for left in (*(run_dir / "checkpoints").glob(f".{_PREFIX}*"), *run_dir.glob(".*.tmp")):
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def write_position(folder: Path, position: Position) -> None:
    """Write the position of a checkpoint, or replace it: the checkpoint is whole at any moment."""
    replace_file(folder, POSITION, json_text(position).encode())


def read_position(folder: Path) -> Position:
    """The position that the checkpoint `folder` was written at. Raises DataFileError if it is missing or damaged."""
    path = folder / POSITION
    try:
        return Position.from_json(path.read_bytes())
    except (FileNotFoundError, ValueError) as error:
        raise DataFileError(f"{path}: missing or damaged ({error}); copy the checkpoint again") from error


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
    folder: Path
    """Its name until then."""
    work: Future[dict[str, FileDigest]]
    """The digests of the files that this rank has written."""


class CheckpointWriter:
    """Writes checkpoints, and removes the older one once the new one is whole. Every rank calls every method.

    A folder gets its name by a rename when all ranks have written, so that a kill at any moment leaves a whole one.

    Args:
        in_background: copy weights and optimizer state in memory and frequencies to a file, write them while training
            goes on, and give the folder its name when the next checkpoint is due, or at the end.
        check: called on rank 0 before a folder is begun, and before it gets its name. What it raises is raised on all
            ranks, and the older checkpoint is still there.
    """

    def __init__(
        self, run_dir: Path, *, in_background: bool = False, check: Callable[[], object] = lambda: None
    ) -> None:
        self._run_dir, self._check = run_dir, check
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
            DivergedError: on all ranks, weights are NaN or infinite. The older checkpoint is still there.
        """
        self.finish()
        on_first_rank(self._check)
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
        with maps_cared_for():
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        on_all_ranks(lambda: _check_numbers(state["model"], self._run_dir))
        if self._in_background:
            state = copy.deepcopy(state)  # torch's own stager of asynchronous saves knows no sharded tensors
        rest = _rest(temporary, model, position, counted) if first else None

        def write() -> dict[str, FileDigest]:
            writer = HashingWriter(temporary)
            try:
                save(state, storage_writer=writer, process_group=self._group)
            except CheckpointException as error:  # which is no Exception, and has those of all ranks
                raise OSError(f"{folder}: cannot be written: {_first_of(error)}") from error
            return writer.digests if rest is None else {**writer.digests, **rest()}

        self._pending = _Pending(commit, temporary, self._thread.submit(write))
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
            written = from_all_ranks(pending.work.result)
            on_first_rank(lambda: write_digests(pending.folder, written, self._digests_of_run()))
            # Whoever takes this run's place sweeps the folder away after that, so that it cannot get its name then.
            on_first_rank(self._check)
        on_first_rank(self._remove_older)

    def _remove_older(self) -> None:
        for old in _all(self._run_dir)[:-1]:
            shutil.rmtree(old)

    def _digests_of_run(self) -> dict[str, FileDigest]:
        """Of what the checkpoint cannot be understood without, and the run has only once."""
        path = self._run_dir / RUN_CONFIG
        return {path.name: FileDigest.of(path)} if path.exists() else {}


def _first_of(error: CheckpointException) -> object:
    """What went wrong on the first of the ranks where something did; an error of the system has led to the others."""
    cause: BaseException = min(error.failures.items())[1][0]
    while cause.__context__ is not None:
        cause = cause.__context__
    return cause


def _check_numbers(state: Mapping[str, Any], run_dir: Path) -> None:
    """Raise DivergedError unless the weights of this rank in `state` are finite."""
    for name, value in state.items():
        parts = [shard.tensor for shard in value.local_shards()] if isinstance(value, ShardedTensor) else [value]
        for part in parts:
            # A sum is one pass without a copy. It may overflow where no number is infinite.
            if part.is_floating_point() and not part.sum().isfinite() and not part.isfinite().all():
                kept = f"the newest checkpoint is {newest(run_dir)}" if exists(run_dir) else "there is no checkpoint"
                raise DivergedError(f"the weights {name!r} are not finite numbers, and not saved; {kept}")


def _rest(
    folder: Path, model: DistributedModelParallel, position: Position, frequencies: Mapping[str, Integers]
) -> Callable[[], dict[str, FileDigest]]:
    """A function that writes what the distributed checkpoint lacks: maps, frequencies and position, as they are now.

    It returns the digests of all files of `folder` but those of tensors, which their writers have.
    """
    write_maps = maps_writer(folder, collections_of(model), frequencies)
    at = copy.deepcopy(position)

    def write() -> dict[str, FileDigest]:
        known = write_maps()
        write_position(folder, at)
        return digests_of(folder, known, but=TENSORS)

    return write


def maps_writer(
    folder: Path, collections: Mapping[str, CCECollection], frequencies: Mapping[str, Integers]
) -> Callable[[], dict[str, FileDigest]]:
    """A function that writes the maps and residents of collections to `folder`, as they are now.

    It returns the digests of the files that the maps' manifests name: file, relative to `folder` → digest.

    Args:
        collections: by their paths.
        frequencies: table → [num_ids], how often the ID at each position of its map was seen.
    """
    maps = {
        path: {
            table.name: snapshot_of(table, collection.pointer_map(table.name), frequencies=frequencies.get(table.name))
            for table in collection.cce_configs()
        }
        for path, collection in collections.items()
    }
    residents = {
        path: {table: collection.remap.residency(table) for table in collection.remap.resident_tables()}
        for path, collection in collections.items()
    }

    def write() -> dict[str, FileDigest]:
        for path, residencies in residents.items():
            if residencies:
                write_residencies(residents_folder(folder, path), residencies)
        known = {}
        for path, tables in maps.items():
            there = maps_folder(folder, path)
            for entry in write_folder(there, tables, provenance=Provenance.of_this_code()).files():
                name = (there / entry.name).relative_to(folder).as_posix()
                known[name] = FileDigest(sha256=entry.sha256, num_bytes=entry.num_bytes)
        return known

    return write
