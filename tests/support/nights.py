"""Small runs that were stopped in training, registries with their maps, and jobs that cluster them overnight."""

import itertools
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from tests.support import runs
from torchrec_cce.jobs.recluster import job as job_module
from torchrec_cce.jobs.recluster.job import ReclusterResult, recluster
from torchrec_cce.jobs.recluster.request import ReclusterJob
from torchrec_cce.jobs.recluster.thresholds import Thresholds
from torchrec_cce.maps.registry import Registry
from torchrec_cce.training import checkpoint, loop
from torchrec_cce.training.versions import snapshot_of_run
from torchrec_cce.workers.inline import InlineEngine

STOPPED = 12
"""The batch after which a run was stopped, between its two clusterings."""
EASY = Thresholds(
    min_h1=0, min_h2_gain=0, min_learned=0, max_churn=1, max_objective_ratio=100, max_error=1, max_unseen=1
)
"""Thresholds that every clustering passes."""


def train_a_run(folder: Path, **changes: Any) -> Path:
    """A run that was stopped after `STOPPED` of its batches, in this process; its log is beside it."""
    log = runs.write_criteo_log(folder / "log.tsv")
    changes.setdefault("recluster", {**runs.CLUSTERINGS, "weigh_by_frequency": True, "num_iterations": 10})
    stops = itertools.chain(itertools.repeat(False, STOPPED - 1), itertools.repeat(True))
    with mock.patch.object(loop.StopRequest, "on_any_rank", side_effect=stops):
        result = loop.train(runs.criteo_config(log, **changes), folder / "run", show_progress=False)
    assert result.interrupted
    return folder / "run"


class Night:
    """A copy of a run, a registry that holds its maps as version 1, and the job that clusters it."""

    def __init__(self, folder: Path, trained: Path, **changes: Any) -> None:
        self.folder, self.run = folder, folder / "run"
        shutil.copytree(trained, self.run)
        self.registry = Registry(folder / "registry", cache=folder / "cache")
        made = snapshot_of_run(trained)
        self.registry.publish(made.tables, checkpoint=made.checkpoint, config_digest=made.config_digest)
        self.output = folder / "output"
        self.job = ReclusterJob(
            registry=str(folder / "registry"), checkpoint=self.run, output=self.output, **{"num_workers": 1} | changes
        )

    def recluster(self, **changes: Any) -> ReclusterResult:
        """By an engine without processes."""
        with mock.patch.object(job_module, "engine_of", return_value=InlineEngine(1)):
            return recluster(replace(self.job, **changes))

    @property
    def versions(self) -> list[int]:
        return [entry.version for entry in self.registry.state().versions]

    def assert_untouched(self) -> None:
        """Assert that nothing was published, and that no other file was left."""
        assert self.registry.state().sequence == 1
        assert self.versions == [1]
        there = {path.name for path in self.folder.iterdir()}
        assert there <= {"run", "registry", "cache", "process", "counts.npz"}, there


def newest(run: Path) -> Path:
    return runs.checkpoints(run)[-1]


def frequencies(folder: Path) -> dict[str, npt.NDArray[np.int64]]:
    """Table → the frequencies that a checkpoint has counted."""
    (path,) = (folder / "maps").iterdir()
    tables = checkpoint.read_maps(folder, path.name)
    return {name: np.array(each) for name, table in tables.items() if (each := table.frequencies) is not None}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Name → tensor, for all tensors of a distributed checkpoint."""
    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    whole = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(whole, checkpoint_id=str(folder), no_dist=True)
    return whole


def assert_same_tensors(first: Path, second: Path) -> None:
    mine, theirs = tensors(first), tensors(second)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


def is_of_table(key: str) -> bool:
    """Whether a clustering changes the tensor of this name; an optimizer goes on counting its steps."""
    is_row = ".embedding_bags.C1." in key or ".embedding_bags.C2." in key
    return (is_row and not key.endswith(".step")) or key.endswith("remap._extra_state")


def counts(folder: Path, sizes: dict[str, int], dtype: Any = np.int64) -> Path:
    """Write an archive of random frequencies, of tables of these `sizes`."""
    rng = np.random.default_rng(3)
    path = folder / "counts.npz"
    np.savez(path, **{name: rng.integers(0, 5, n).astype(dtype) for name, n in sizes.items()})  # type: ignore[arg-type]
    return path


def at_the_moment(name: str, deed: Callable[[], object]) -> Any:
    """Do something just before a function of the job's module is called."""
    real = getattr(job_module, name)

    def instead(*args: Any, **kwargs: Any) -> Any:
        deed()
        return real(*args, **kwargs)

    return mock.patch.object(job_module, name, instead)


def killable(job: Any) -> float:
    """How long the job took."""
    started = time.monotonic()
    with mock.patch.object(job_module, "engine_of", return_value=InlineEngine(1)):
        job_module.recluster(job)
    return time.monotonic() - started
