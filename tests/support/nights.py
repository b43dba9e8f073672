"""Small runs in the middle of their training, registries that hold their maps, and jobs that cluster them."""

import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
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
from torchrec_cce.maps.registry import Registry
from torchrec_cce.training import checkpoint, loop
from torchrec_cce.training.versions import snapshot_of_run

Task = TypeVar("Task")
Result = TypeVar("Result")
STOPPED = 12
"""Batches after which a run was stopped: between its two clusterings."""


class Kept(NamedTuple):
    """A value that is shared with nobody."""

    value: Any

    def get(self) -> Any:
        return self.value


class InlineEngine:
    """No workers: tests of what is around them need not wait for processes to start."""

    num_workers = 1

    def share(self, value: Any) -> Kept:
        return Kept(value)

    def run(
        self, function: Callable[[Task], Result], tasks: Iterable[Task], *, threads: int = 1
    ) -> Iterator[tuple[Task, Result]]:
        assert threads == 1
        return ((task, function(task)) for task in tasks)

    def __enter__(self) -> "InlineEngine":
        return self

    def __exit__(self, *_: object) -> None:
        pass


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
        with mock.patch.object(job_module, "engine_of", return_value=InlineEngine()):
            return recluster(replace(self.job, **changes))

    @property
    def versions(self) -> list[int]:
        return [one.version for one in self.registry.state().versions]

    def assert_untouched(self) -> None:
        """Nothing was published, and nothing lies around."""
        assert self.registry.state().sequence == 1
        assert self.versions == [1]
        there = {path.name for path in self.folder.iterdir()}
        assert there <= {"run", "registry", "cache", "process", "counts.npz"}, there


def newest(run: Path) -> Path:
    return runs.checkpoints(run)[-1]


def frequencies(folder: Path) -> dict[str, npt.NDArray[np.int64]]:
    """What a checkpoint has counted."""
    (path,) = (folder / "maps").iterdir()
    tables = checkpoint.read_maps(folder, path.name)
    return {name: np.array(each) for name, table in tables.items() if (each := table.frequencies) is not None}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All of a distributed checkpoint."""
    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    whole = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(whole, checkpoint_id=str(folder), no_dist=True)
    return whole


def assert_same_tensors(one: Path, other: Path) -> None:
    mine, theirs = tensors(one), tensors(other)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


def is_of_table(key: str) -> bool:
    """Whether a tensor is what a clustering changes."""
    return ".embedding_bags.C1." in key or ".embedding_bags.C2." in key or key.endswith("remap._extra_state")


def counts(folder: Path, sizes: dict[str, int], dtype: Any = np.int64) -> Path:
    """An archive of frequencies."""
    rng = np.random.default_rng(3)
    path = folder / "counts.npz"
    np.savez(path, **{name: rng.integers(0, 5, n).astype(dtype) for name, n in sizes.items()})  # type: ignore[arg-type]
    return path
