"""Writes the checkpoints of a run, while it trains on if that is wanted."""

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

from torchrec_cce.files.atomic import atomic_path
from torchrec_cce.files.cache import scratch_copy
from torchrec_cce.maps.bundle import write_folder
from torchrec_cce.maps.manifest import Provenance
from torchrec_cce.sharding.agreement import on_all_ranks
from torchrec_cce.sharding.frequencies import ShardedFrequencies
from torchrec_cce.sharding.tables import collections_of
from torchrec_cce.training import checkpoint
from torchrec_cce.training.schedule import Position


class _Pending(NamedTuple):
    """A checkpoint that is being written."""

    commit: ExitStack
    """Its end gives the folder its name, on rank 0."""
    work: Future[None]


class CheckpointWriter:
    """Writes checkpoints and removes the one before. Every rank calls every method.

    A folder gets its name by a rename when all ranks have written, so that a kill at any moment leaves a whole one.

    Args:
        in_background: copy weights, optimizer state and frequencies (these to a file), write them while training goes
            on, and give the folder its name when the next checkpoint is due, or at the end.
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
            OSError: on all ranks, as `finish`, or where there is no room for a copy.
        """
        self.finish()
        first = dist.get_rank() == 0
        folder = checkpoint.folder_of(self._run_dir, position.step)
        if folder.exists():  # nothing was trained since, but an epoch may have ended and its evaluation been the best
            if first:
                checkpoint.write_position(folder, position)
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
            OSError: on all ranks, if one could not write its part; the checkpoint before is still there.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        with pending.commit:
            on_all_ranks(pending.work.result)
        if dist.get_rank() == 0:
            for old in checkpoint.superseded(self._run_dir):
                shutil.rmtree(old)
        dist.barrier()


def _rest(
    folder: Path, model: DistributedModelParallel, position: Position, frequencies: Mapping[str, npt.NDArray[np.int64]]
) -> Callable[[], None]:
    """Writes what the distributed checkpoint does not: maps, frequencies and position, as they are now."""
    maps = {
        path: checkpoint.map_snapshots(collection, frequencies) for path, collection in collections_of(model).items()
    }
    at = copy.deepcopy(position)

    def write() -> None:
        for path, tables in maps.items():
            write_folder(checkpoint.maps_folder(folder, path), tables, provenance=Provenance.of_this_code())
        checkpoint.write_position(folder, at)

    return write
