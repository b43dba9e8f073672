"""A run that was stopped, by a signal at any moment, goes on as if it had not been."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import runs
from tests.support.launch import Finished, Job, command
from tests.support.runs import assert_same_run, maps_folder, maps_of, stop_after, train
from torchrec_cce.errors import CCEError, ConfigError, MapFileError, MapMismatchError
from torchrec_cce.maps.bundle import write_folder
from torchrec_cce.maps.manifest import Manifest, Provenance
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.sharding.digests import DIGESTS
from torchrec_cce.sharding.frequencies import ShardedFrequencies
from torchrec_cce.training import checkpoint, loop
from torchrec_cce.training.checkpoint import CheckpointWriter
from torchrec_cce.training.config import RunConfig
from torchrec_cce.training.config_file import read_run_config

OPTIMIZERS = ("rowwise_adagrad", "adagrad", "sgd", "adam", "adamw")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_interrupted_and_resumed(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    """Stopped between the clusterings after batches 8 and 16, and once more after them."""
    config = runs.criteo_config(
        log, optimizer={"embedding": optimizer}, recluster={**runs.CLUSTERINGS, "weigh_by_frequency": True}
    )
    monkeypatch.setattr(loop, "_LOG_EVERY", 4)
    stop_after(monkeypatch, None)
    train(config, tmp_path / "undisturbed")
    stop_after(monkeypatch, 11)
    assert train(config, tmp_path / "run").interrupted
    assert runs.result(tmp_path / "run")["steps"] == 11
    stop_after(monkeypatch, 9)
    assert train(config, tmp_path / "run", resume=True).interrupted
    stop_after(monkeypatch, None)
    assert train(config, tmp_path / "run", resume=True).steps == runs.BATCHES + 1
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


@pytest.mark.parametrize("stops", [(8,), (26,), (27,), (16, 6, 1, 1), (52,)])
def test_stopped_where_something_else_happens(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: tuple[int, ...]
) -> None:
    """After the batch of a clustering, the last one of an epoch, the first one of the next, the very last one."""
    config = runs.criteo_config(
        log, training={"batch_size": runs.BATCH_SIZE, "evaluate_every": None, "epochs": 2, "early_stopping": True}
    )
    stop_after(monkeypatch, None)
    train(config, tmp_path / "undisturbed")
    for i, step in enumerate(stops):
        stop_after(monkeypatch, step)
        assert train(config, tmp_path / "run", resume=i > 0).interrupted
    stop_after(monkeypatch, None)
    assert not train(config, tmp_path / "run", resume=True).interrupted
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adamw"])
def test_checkpoints_written_in_the_background(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """Each holds the moment it was taken at, whatever was trained and clustered while it was written."""
    training = {"batch_size": runs.BATCH_SIZE, "checkpoint_every": 7, "checkpoint_in_background": True}
    config = runs.criteo_config(
        log,
        optimizer={"embedding": optimizer},
        training=training,
        recluster={**runs.CLUSTERINGS, "weigh_by_frequency": True},
    )
    finish = CheckpointWriter.finish
    taken = []

    def late(writer: CheckpointWriter) -> None:
        if writer._pending is not None:
            taken.append(len(runs.checkpoints(tmp_path / "run")))
            time.sleep(0.2)
        finish(writer)

    monkeypatch.setattr(CheckpointWriter, "finish", late)
    stop_after(monkeypatch, None)
    train(config, tmp_path / "run")
    assert taken == [0, 1, 1, 1], "while one is written, the one before is there"
    stop_after(monkeypatch, 16)
    assert train(config, tmp_path / "interrupted").interrupted
    stop_after(monkeypatch, None)
    train(config, tmp_path / "interrupted", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "interrupted")
    in_front = {**training, "checkpoint_in_background": False}
    train(
        runs.criteo_config(
            log,
            optimizer={"embedding": optimizer},
            training=in_front,
            recluster={**runs.CLUSTERINGS, "weigh_by_frequency": True},
        ),
        tmp_path / "front",
    )
    assert_same_run(tmp_path / "run", tmp_path / "front")


@pytest.mark.parametrize("in_background", [False, True])
def test_frequencies_are_of_the_moment_of_a_checkpoint(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_background: bool
) -> None:
    """However late they are written: ranks exchange after every batch here, so that counts change all the time."""
    training = {"batch_size": runs.BATCH_SIZE, "checkpoint_every": 4, "checkpoint_in_background": in_background}
    config = runs.criteo_config(log, training=training, recluster={**runs.CLUSTERINGS, "weigh_by_frequency": True})
    monkeypatch.setitem(ShardedFrequencies.__init__.__kwdefaults__, "most_kept", 0)
    write, trained, counted = checkpoint.write_folder, [0], {}
    forward = loop.Run.forward

    def one_more(run: Any, batch: Any) -> torch.Tensor:
        trained[0] += 1
        return forward(run, batch)

    def late(folder: Path, tables: dict[str, TableSnapshot], **options: Any) -> Manifest:
        saved, deadline = int(folder.parts[-3].split("-")[1].split(".")[0]), time.monotonic() + 1
        while in_background and trained[0] < saved + 3 and time.monotonic() < deadline:
            time.sleep(0.005)
        manifest = write(folder, tables, **options)
        counted[saved] = [int(table.frequencies.sum()) for table in tables.values()]  # type: ignore[union-attr]
        return manifest

    monkeypatch.setattr(loop.Run, "forward", one_more)
    monkeypatch.setattr(checkpoint, "write_folder", late)
    stop_after(monkeypatch, 23)
    train(config, tmp_path / "run")
    assert counted == {saved: [saved * runs.BATCH_SIZE] * 2 for saved in (4, 8, 12, 16, 20, 23)}


def test_a_full_disk_when_frequencies_are_copied(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = {"batch_size": runs.BATCH_SIZE, "checkpoint_every": 7, "checkpoint_in_background": True}
    config = runs.criteo_config(log, training=training, recluster={**runs.CLUSTERINGS, "weigh_by_frequency": True})
    copy, calls = checkpoint.scratch_copy, itertools.count(1)

    def full(array: Any) -> Any:
        if next(calls) == 4:
            raise OSError(28, "No space left on device")
        return copy(array)

    monkeypatch.setattr(checkpoint, "scratch_copy", full)
    with pytest.raises(OSError, match="No space left"):
        train(config, tmp_path / "run")
    (left,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert left.name.endswith("07")
    train(config, tmp_path / "undisturbed")
    train(config, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


def test_a_checkpoint_without_frequencies_is_not_counted_on(log: Path, tmp_path: Path) -> None:
    train(runs.criteo_config(log), tmp_path / "run")
    counting = runs.criteo_config(log, recluster={**runs.CLUSTERINGS, "weigh_by_frequency": True})
    (tmp_path / "run" / "config.json").write_text(json.dumps(counting.as_dict()))
    (runs.checkpoints(tmp_path / "run")[0] / DIGESTS).unlink()  # which would find another configuration
    with pytest.raises(ConfigError, match=r"step-0000000026: no frequencies of \['C1', 'C2'\], which weigh_by_freq"):
        train(counting, tmp_path / "run", resume=True)


def test_a_background_checkpoint_that_fails_is_an_error_and_leaves_the_last_one(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"batch_size": runs.BATCH_SIZE, "checkpoint_every": 7, "checkpoint_in_background": True}
    config = runs.criteo_config(log, training=training)
    write, calls = checkpoint.write_folder, itertools.count(1)

    def full(*arguments: Any, **options: Any) -> Manifest:
        if next(calls) == 2:
            raise OSError(28, "No space left on device")
        return write(*arguments, **options)

    monkeypatch.setattr(checkpoint, "write_folder", full)
    with pytest.raises(OSError, match="No space left"):
        train(config, tmp_path / "run")
    (left,) = runs.checkpoints(tmp_path / "run")
    assert left.name.endswith("07")
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    train(config, tmp_path / "undisturbed")
    train(config, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


def test_a_finished_run_that_is_resumed_stays_as_it_is(log: Path, tmp_path: Path) -> None:
    config = runs.criteo_config(log, training={"batch_size": runs.BATCH_SIZE, "checkpoint_every": 13})
    train(config, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "before")
    train(config, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "before")


def test_what_was_measured_after_the_checkpoint_is_measured_again(log: Path, tmp_path: Path) -> None:
    """A killed run may leave newer metrics than its checkpoint, and half a line."""
    config = runs.criteo_config(log)
    train(config, tmp_path / "run")
    expected = runs.metrics(tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 99, "time": 0.0}\n{"kind": "tra')
    train(config, tmp_path / "run", resume=True)
    assert runs.metrics(tmp_path / "run") == expected


# Signals, to real processes


def start(tmp_path: Path, config: RunConfig, name: str, *more: str) -> Any:
    path = runs.write_toml(tmp_path / "run.toml", config)
    return command(tmp_path / name, "train", path, "--run-dir", tmp_path / "run", "--quiet", *more)


def undisturbed(tmp_path: Path, config: RunConfig) -> Path:
    """In a process like those of `start`: with other threads sums might have another order."""
    finished = Job(tmp_path / "job", loop.train, config, tmp_path / "undisturbed").wait()
    assert finished.code == 0, finished.stderr
    return tmp_path / "undisturbed"


def lines_of(finished: Finished) -> list[str]:
    return finished.stderr.splitlines()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c(log: Path, tmp_path: Path, number: signal.Signals) -> None:
    config = runs.criteo_config(log, training={"batch_size": runs.BATCH_SIZE, "evaluate_every": 2, "epochs": 3})
    expected = undisturbed(tmp_path, config)
    job = start(tmp_path, config, "first")
    metrics = tmp_path / "run" / "metrics.jsonl"
    job.wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0)
    os.kill(job.pid, number)
    finished = job.wait()
    assert finished.code == 130
    first, second = lines_of(finished)
    assert re.match(r"interrupted after \d+ batches", first)
    assert second == f"continue with --resume --run-dir {tmp_path / 'run'}"
    (checkpoint,) = runs.checkpoints(tmp_path / "run")
    assert str(checkpoint) in first
    assert runs.result(tmp_path / "run")["interrupted"] is True
    assert 2 <= runs.result(tmp_path / "run")["steps"] < 3 * (runs.BATCHES + 1)

    finished = start(tmp_path, config, "second", "--resume").wait()
    assert finished.code == 0
    (line,) = lines_of(finished)
    assert line.startswith(f"finished after {3 * (runs.BATCHES + 1)} batches")
    assert_same_run(tmp_path / "run", expected)


def test_killed_at_random_moments(log: Path, tmp_path: Path) -> None:
    """The newest checkpoint is whole after every kill, and the run ends where an undisturbed one does."""
    config = runs.criteo_config(
        log,
        recluster={**runs.CLUSTERINGS, "weigh_by_frequency": True},
        training={"batch_size": runs.BATCH_SIZE, "evaluate_every": 6, "checkpoint_every": 1, "epochs": 2},
    )
    expected = undisturbed(tmp_path, config)
    run_dir = tmp_path / "run"
    delays = random.Random(0)
    steps = [0]
    for kill in range(3):
        job = start(tmp_path, config, f"kill-{kill}", *(["--resume"] if kill else []))
        job.wait_for(lambda: bool(runs.checkpoints(run_dir)) and step_of(run_dir) > steps[-1])
        time.sleep(delays.uniform(0, 0.3))
        os.kill(job.pid, signal.SIGKILL)
        assert job.wait().code == -signal.SIGKILL
        steps.append(step_of(run_dir))
        assert loop.evaluate(config, run_dir, config.data.test).rows > 0  # type: ignore[arg-type]
    assert steps[-1] < 2 * (runs.BATCHES + 1), "it ended before it could be killed"
    finished = start(tmp_path, config, "last", "--resume").wait()
    assert finished.code == 0, finished.stderr
    assert_same_run(run_dir, expected)
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step-{2 * (runs.BATCHES + 1):010d}"]


def step_of(run_dir: Path) -> int:
    return int(runs.checkpoints(run_dir)[-1].name.removeprefix("step-"))


def test_killed_before_the_first_checkpoint(log: Path, tmp_path: Path) -> None:
    config = runs.criteo_config(log)
    job = start(tmp_path, config, "first")
    job.wait_for((tmp_path / "run" / "metrics.jsonl").exists)
    os.kill(job.pid, signal.SIGKILL)
    assert job.wait().code == -signal.SIGKILL
    assert not runs.checkpoints(tmp_path / "run")
    finished = start(tmp_path, config, "second", "--resume").wait()
    assert finished.code == 2
    (line,) = lines_of(finished)
    assert line.startswith(f"error: {tmp_path / 'run'}: no checkpoint; one is written every training.checkpoint_every ")


# Checkpoints whose maps are not their own


@pytest.fixture(scope="module")
def trained(log: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs that differ in their seeds."""
    folder = tmp_path_factory.mktemp("trained")
    for seed in (0, 1):
        weighed = {**runs.CLUSTERINGS, "weigh_by_frequency": True}
        train(runs.criteo_config(log, seed=seed, recluster=weighed), folder / str(seed))
    return folder / "0", folder / "1"


def replace_maps(run_dir: Path, tables: dict[str, TableSnapshot]) -> None:
    folder = maps_folder(run_dir)
    shutil.rmtree(folder)
    write_folder(folder, tables, provenance=Provenance.of_this_code())


def error_of(run_dir: Path) -> CCEError:
    """What resuming raises, before anything is read from the log."""
    config = read_run_config(run_dir)
    assert config.data.test is not None
    with pytest.raises(CCEError) as evaluated:
        loop.evaluate(config, run_dir, config.data.test)
    before = runs.metrics(run_dir)
    with pytest.raises(CCEError) as resumed:
        train(config, run_dir, resume=True)
    assert str(resumed.value) == str(evaluated.value)
    assert "\n" not in str(resumed.value)
    assert runs.metrics(run_dir) == before
    return resumed.value


def test_the_map_of_another_run(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run_dir = shutil.copytree(trained[0], tmp_path / "run")
    own, others = (maps_of(one)["C1"].pointer_map for one in trained)
    replace_maps(run_dir, maps_of(trained[1]))
    error = error_of(run_dir)
    assert isinstance(error, MapMismatchError)
    assert "'C1'" in str(error)
    for pointer_map in (own, others):
        assert pointer_map.identity in str(error)


def test_the_map_of_another_table(trained: tuple[Path, Path], tmp_path: Path) -> None:
    run_dir = shutil.copytree(trained[0], tmp_path / "run")
    own = maps_of(trained[0])
    replace_maps(run_dir, {"C1": own["C2"], "C2": own["C1"]})
    error = error_of(run_dir)
    assert isinstance(error, MapMismatchError)
    assert "'C1' has 1000 IDs" in str(error)
    assert "800 IDs" in str(error)


@pytest.mark.parametrize("file", ["0000.pointers.arrow", "0001.frequencies.arrow", "manifest.json"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_one_flipped_bit_in_the_maps(trained: tuple[Path, Path], tmp_path: Path, file: str, share: float) -> None:
    run_dir = shutil.copytree(trained[0], tmp_path / "run")
    path = maps_folder(run_dir) / file
    content = bytearray(path.read_bytes())
    content[int(len(content) * share)] ^= 4
    path.write_bytes(content)
    error = error_of(run_dir)
    assert isinstance(error, MapFileError)
    assert str(path) in str(error)


@pytest.mark.parametrize("file", ["0001.pointers.arrow", "0000.frequencies.arrow", "manifest.json"])
def test_a_map_that_is_cut_short_or_gone(trained: tuple[Path, Path], tmp_path: Path, file: str) -> None:
    run_dir = shutil.copytree(trained[0], tmp_path / "run")
    path = maps_folder(run_dir) / file
    path.write_bytes(path.read_bytes()[:-100])
    assert isinstance(error_of(run_dir), MapFileError)
    path.unlink()
    error = error_of(run_dir)
    assert isinstance(error, MapFileError)
    assert str(path) in str(error)


def test_no_run_to_resume(log: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json, so there is no run"):
        train(runs.criteo_config(log), tmp_path, resume=True)
