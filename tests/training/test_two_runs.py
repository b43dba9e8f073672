"""Two processes in one run folder: one trains, and one that wakes up after its successor took over writes nothing."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import runs
from tests.support.launch import Job
from torchrec_cce.errors import JobError
from torchrec_cce.maps.registry import Registry
from torchrec_cce.training import checkpoint, loop
from torchrec_cce.training.config import RunConfig
from torchrec_cce.training.metrics import MetricsLog


def stopped_before(config: RunConfig, run_dir: Path, moment: str) -> None:
    """Train, and sleep before the second time that this moment comes."""
    count = 0

    def sleeping(function: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count == 2:
                (run_dir.parent / "asleep").touch()
                os.kill(os.getpid(), signal.SIGSTOP)
            return function(*args, **kwargs)

        return wrapper

    holder, name = {
        "a record": (MetricsLog, "write"),
        "a checkpoint": (loop.CheckpointWriter, "save"),
        "the name of a checkpoint": (checkpoint, "write_digests"),
        "a version": (Registry, "publish"),
    }[moment]
    setattr(holder, name, sleeping(getattr(holder, name)))
    loop.train(config, run_dir, show_progress=False)


def config_of(folder: Path, log: Path) -> RunConfig:
    return runs.criteo_config(
        log,
        registry={"url": str(folder / "registry")},
        training={"batch_size": runs.BATCH_SIZE, "evaluate_every": 6, "checkpoint_every": 6},
    )


@pytest.mark.parametrize("moment", ["a record", "a checkpoint", "the name of a checkpoint", "a version"])
def test_who_wakes_up_after_its_successor_writes_nothing(log: Path, tmp_path: Path, moment: str) -> None:
    config, run_dir = config_of(tmp_path, log), tmp_path / "run"
    job = Job(tmp_path / "job", stopped_before, config, run_dir, moment, TORCHREC_CCE_CACHE=str(tmp_path / "cache"))
    job.wait_for((tmp_path / "asleep").exists)
    with pytest.raises(JobError, match=rf"another process trains here: process {job.pid} on .*, since 20"):
        loop.train(config, run_dir, start="resume", show_progress=False)
    (run_dir / ".lock").unlink()  # as its message says, if it cannot be reached
    loop.train(config, run_dir, start="either", show_progress=False)
    assert not (run_dir / ".lock").exists()
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    history = Registry(tmp_path / "registry").history()
    os.kill(job.pid, signal.SIGCONT)
    finished = job.wait()
    assert finished.code == 1
    assert "JobError" in finished.stderr or "FileNotFoundError" in finished.stderr or "Conflict" in finished.stderr
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    assert Registry(tmp_path / "registry").history() == history


def test_two_supervised_runs(log: Path, tmp_path: Path) -> None:
    """The second, which was to go on if it can, leaves the first alone; after SIGKILL it goes on by itself."""
    config, run_dir = config_of(tmp_path, log), tmp_path / "run"
    runs_alone = Job(tmp_path / "alone", loop.train, config_of(tmp_path / "other", log), tmp_path / "other" / "run")
    assert runs_alone.wait().code == 0
    job = Job(tmp_path / "job", stopped_before, config, run_dir, "a checkpoint")
    job.wait_for((tmp_path / "asleep").exists)
    with pytest.raises(JobError, match="another process trains here"):
        loop.train(config, run_dir, start="either", show_progress=False)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    assert json.loads((run_dir / ".lock").read_text())["pid"] == job.pid
    loop.train(config, run_dir, start="either", show_progress=False)
    found, wanted = (
        [record for record in runs.metrics(folder) if record["kind"] != "publish"]  # those have other numbers
        for folder in (run_dir, tmp_path / "other" / "run")
    )
    assert found == wanted
