"""A live run follows its registry: moved on all ranks at one step, never held up, and never lost to a kill."""

import itertools
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.support import runs
from tests.support.launch import TIMEOUT, Job, on_ranks
from tests.support.runs import assert_same_run, stop_after
from tests.support.torchrun import torchrun
from torchrec_cce import CCEEmbeddingBagCollection
from torchrec_cce.data.criteo import read_criteo
from torchrec_cce.maps.bundle import read_folder
from torchrec_cce.maps.registry import Registry
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.maps.vocabulary import Vocabulary
from torchrec_cce.sharding import frequencies
from torchrec_cce.sharding.watch import Adoption, VersionWatcher
from torchrec_cce.training import checkpoint, loop
from torchrec_cce.training.config import RunConfig

Digests = dict[str, str]


def watching(log: Path, folder: Path, *, watch_every: int = 1, **changes: Any) -> RunConfig:
    """A run that follows `folder/registry` and does not cluster by itself."""
    registry = {"url": str(folder / "registry"), "watch_every": watch_every}
    return runs.criteo_config(log, **{"registry": registry, "recluster": {"ct": 0}, **changes})


def clustered(config: RunConfig, *, seed: int) -> dict[str, TableSnapshot]:
    """Tables that another job has made for the model of a run."""
    torch.manual_seed(seed)
    collection = CCEEmbeddingBagCollection(tables=config.table_configs())
    return collection.snapshot(collection.recluster(seed=seed))


def digests(tables: dict[str, TableSnapshot]) -> Digests:
    return {name: table.pointer_map.digest for name, table in tables.items()}


def swaps(run_dir: Path) -> list[dict[str, Any]]:
    """The records of moves so far; of each of them one, of the table C1 if it has several."""
    with suppress(FileNotFoundError):
        lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return [r for r in records if r["kind"] == "swap" and r.get("table", "C1") == "C1"]
    return []


def in_checkpoint(run_dir: Path) -> Digests:
    (maps,) = runs.checkpoints(run_dir)[-1].glob("maps/*")
    _, tables = read_folder(maps)
    return digests(tables)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.005)


def publish_while_they_train(config: RunConfig, folder: Path) -> None:
    """Two versions, one of another model, and a step back; each when the one before has arrived."""
    registry = Registry(folder / "registry", cache=folder / "cache")
    other = runs.criteo_config(Path("log"), embedding={"max_parameters": 1600})
    steps: list[Callable[[], object]] = [
        lambda: registry.publish(clustered(config, seed=1)),
        lambda: registry.publish(clustered(config, seed=2)),
        lambda: registry.publish(clustered(other, seed=3)),
        lambda: registry.rollback(1),
    ]
    for number, step in enumerate(steps):
        wait_until(lambda there=number: len(swaps(folder / "run")) >= there)  # type: ignore[misc]
        step()


def train_until(config: RunConfig, folder: Path, answers: int) -> tuple[Digests, list[Adoption]]:
    """To the batch after which the watcher has answered so often. Returns the maps of this rank, and the answers."""
    os.environ["TORCHREC_CCE_CACHE"] = str(folder / "cache")
    follow, start = VersionWatcher.adopt_current, loop.Run.__init__
    found: list[Adoption] = []
    started: list[loop.Run] = []

    def noted(*arguments: Any, **options: Any) -> Adoption | None:
        answer = follow(*arguments, **options)
        found.extend([] if answer is None else [answer])
        return answer

    def kept(run: loop.Run, *arguments: Any, **options: Any) -> None:
        start(run, *arguments, **options)
        started.append(run)

    VersionWatcher.adopt_current = noted  # type: ignore[method-assign]
    loop.Run.__init__ = kept  # type: ignore[method-assign]
    loop.StopRequest.on_any_rank = lambda _: len(found) >= answers  # type: ignore[method-assign]
    loop.train(config, folder / "run", show_progress=False)
    maps = {name: one.pointer_map(name) for one in started[0].collections for name in one.cce_tables()}
    return {name: one.digest for name, one in maps.items()}, found


def test_published_by_another_process_while_two_ranks_train(log: Path, tmp_path: Path) -> None:
    config = watching(log, tmp_path, watch_every=2, training={"batch_size": runs.BATCH_SIZE, "epochs": 10_000})
    publisher = Job(tmp_path / "publisher", publish_while_they_train, config, tmp_path)
    ranks = on_ranks(tmp_path / "ranks", 2, train_until, config, tmp_path, 4)
    for process in (publisher.wait(), *ranks):
        assert process.code == 0, process.stderr
    registry = Registry(tmp_path / "registry", cache=tmp_path / "cache")
    for rank in ranks:
        maps, answers = rank.value
        assert [(one.version, one.error is None) for one in answers] == [(1, True), (2, True), (3, False), (1, True)]
        assert maps == digests(dict(registry.open(1).tables)) == in_checkpoint(tmp_path / "run")
    records = swaps(tmp_path / "run")
    assert [record["version"] for record in records] == [1, 2, 3, 1]
    assert all(record["step"] % 2 == 0 for record in records)
    assert [record.get("share_changed", 0) > 0.5 for record in records] == [True, True, False, True]
    assert [record.get("objective", 0) > 0 for record in records] == [True, True, False, True]
    assert records[2]["error"].startswith("table 'C1' has 1000 IDs, 4 columns, 100 rows; the map, version 3, ")
    assert ranks[0].stderr.count("the model does not move to version 3: table 'C1' has 1000 IDs") == 1
    assert "does not move" not in ranks[1].stderr
    assert checkpoint.read_position(checkpoint.newest(tmp_path / "run")).version == 1


@pytest.mark.timeout(300)
def test_killed_before_and_after_a_swap(log: Path, tmp_path: Path) -> None:
    """The run goes on from its checkpoint, with the map in it, and moves again."""
    training = {"batch_size": runs.BATCH_SIZE, "evaluate_every": 50, "checkpoint_every": 10, "epochs": 12}
    config = watching(log, tmp_path, training=training)
    registry = Registry(tmp_path / "registry", cache=tmp_path / "cache")
    tables = clustered(config, seed=1)
    choose = random.Random(0)
    with torchrun(tmp_path, config, "--restartable", max_restarts=10) as run:
        assert run.wait_for(lambda: checkpoint.exists(tmp_path / "run"))
        registry.publish(tables)
        run.kill_a_rank(choose)
        assert run.wait_for(lambda: bool(swaps(tmp_path / "run")))
        run.kill_a_rank(choose)
    assert [each["version"] for each in swaps(tmp_path / "run")] == [1]
    assert in_checkpoint(tmp_path / "run") == digests(tables) == digests(dict(registry.open().tables))
    assert position(tmp_path / "run").version == 1
    assert runs.result(tmp_path / "run")["steps"] == 12 * (runs.BATCHES + 1)


def position(run_dir: Path) -> Any:
    return checkpoint.read_position(checkpoint.newest(run_dir))


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adamw"])
def test_resumed_after_a_swap(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str) -> None:
    """Stopped at the batch of the move, and after the run published by itself; bit for bit as if it had not been."""
    for name, stops in (("undisturbed", [None]), ("run", [3, 7, None])):
        # Each run has a registry of its own, in which it finds the same version.
        config = watching(log, tmp_path / name, recluster=runs.CLUSTERINGS, optimizer={"embedding": optimizer})
        registry = Registry(tmp_path / name / "registry", cache=tmp_path / "cache")
        registry.publish(clustered(config, seed=1))
        for number, step in enumerate(stops):
            stop_after(monkeypatch, step)
            start = "resume" if number else "new"
            loop.train(config, tmp_path / name / "run", start=start, show_progress=False)  # type: ignore[arg-type]
    assert_same_run(tmp_path / "run" / "run", tmp_path / "undisturbed" / "run")
    (swap,) = swaps(tmp_path / "run" / "run")
    assert (swap["step"], swap["version"]) == (3, 1)
    published = [r["version"] for r in runs.metrics(tmp_path / "run" / "run") if r["kind"] == "publish"]
    assert published == [2, 3], "and did not move to what it published"
    assert position(tmp_path / "run" / "run").version == 3


@pytest.mark.usefixtures("at_once")
def test_what_a_run_published_in_a_future_that_was_lost_is_no_news(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after it published and before it saved, the run starts again before the clustering."""
    config = watching(log, tmp_path, recluster=runs.CLUSTERINGS)
    stop_after(monkeypatch, 5)
    loop.train(config, tmp_path / "run", show_progress=False)
    shutil.copytree(tmp_path / "run", tmp_path / "then")
    stop_after(monkeypatch, 5)
    loop.train(config, tmp_path / "run", start="resume", show_progress=False)
    registry = Registry(tmp_path / "registry", cache=tmp_path / "cache")
    assert registry.state().current == 1
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "then").rename(tmp_path / "run")
    stop_after(monkeypatch, None)
    loop.train(config, tmp_path / "run", start="resume", show_progress=False)
    assert swaps(tmp_path / "run") == []
    assert registry.state().current == position(tmp_path / "run").version == 3
    assert in_checkpoint(tmp_path / "run") == digests(dict(registry.open().tables))


@pytest.mark.usefixtures("at_once")
def test_what_others_published_first_is_not_undone(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Between the run's look and its own clustering: the run does not publish, and moves."""
    config = watching(log, tmp_path, watch_every=4, recluster={"ct": 1, "cf": 14})
    registry = Registry(tmp_path / "registry", cache=tmp_path / "cache")
    registry.publish(clustered(config, seed=1))
    recluster = loop._Training.recluster

    def late(run: loop._Training, *arguments: Any) -> None:
        registry.publish(clustered(config, seed=2))
        recluster(run, *arguments)

    monkeypatch.setattr(loop._Training, "recluster", late)
    loop.train(config, tmp_path / "run", show_progress=False)
    assert [(each["step"], each["version"]) for each in swaps(tmp_path / "run")] == [(12, 1), (24, 2)]
    assert "the tables were made from version 1, but current is version 2" in caplog.text
    assert registry.state().current == 2


@pytest.mark.usefixtures("at_once")
def test_a_version_with_a_vocabulary_is_not_for_a_run_without(log: Path, tmp_path: Path) -> None:
    config = watching(log, tmp_path)
    tables = clustered(config, seed=1)
    keys = Vocabulary.build(np.arange(50), num_threads=1)
    for name in ("C1", "C2"):
        tables[name] = replace(tables[name], pointer_map=tables[name].pointer_map.with_vocabulary(keys))
    Registry(tmp_path / "registry", cache=tmp_path / "cache").publish(tables)
    loop.train(config, tmp_path / "run", show_progress=False)
    (record,) = [r for r in runs.metrics(tmp_path / "run") if r["kind"] == "swap"]
    assert "by a vocabulary or a policy, in only one of the version and this run" in record["error"]


@pytest.mark.usefixtures("at_once")
def test_a_run_with_a_vocabulary_moves_to_a_larger_one(log: Path, tmp_path: Path) -> None:
    """Started from one; what it has counted of each ID goes with it, for its own clustering after the move."""
    registry = {"url": str(tmp_path / "registry"), "start": 1, "watch_every": 1}
    recluster = {"ct": 1, "cf": 14, "weigh_by_frequency": True}
    config = watching(log, tmp_path, registry=registry, recluster=recluster)
    store = Registry(tmp_path / "registry", cache=tmp_path / "cache")
    for seed, keys in enumerate((np.arange(300), np.arange(700)[::-1])):
        tables = clustered(config, seed=seed)
        for name in ("C1", "C2"):
            grown = tables[name].pointer_map.with_vocabulary(Vocabulary.build(keys.copy(), num_threads=1))
            tables[name] = replace(tables[name], pointer_map=grown)
        store.publish(tables)
    loop.train(config, tmp_path / "run", show_progress=False)
    assert [(each["step"], each["version"]) for each in swaps(tmp_path / "run")] == [(3, 2)]
    opened = store.open()
    assert opened.version == 3, "the run's own"
    counts, keys = opened.tables["C1"].frequencies, np.arange(700)[::-1]
    assert counts is not None
    ids = np.concatenate([batch.ids["C1"].values for batch in read_criteo(log, max_rows=14 * runs.BATCH_SIZE)])
    expected = np.bincount(ids % 1000, minlength=1000)[keys]
    before = np.bincount(ids[: 3 * runs.BATCH_SIZE] % 1000, minlength=1000)[keys]
    np.testing.assert_array_equal(counts, expected - np.where(keys < 300, 0, before))


@pytest.mark.usefixtures("at_once")
def test_a_disk_without_room_for_more_frequencies(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run stays where it is and counts on, until there is room."""
    registry = {"url": str(tmp_path / "registry"), "start": 1, "watch_every": 1}
    config = watching(log, tmp_path, registry=registry, recluster={"ct": 0, "weigh_by_frequency": True})
    store = Registry(tmp_path / "registry", cache=tmp_path / "cache")
    for keys in (np.arange(1000), np.arange(1000)[::-1]):
        tables = clustered(config, seed=1)
        for name in ("C1", "C2"):
            grown = tables[name].pointer_map.with_vocabulary(Vocabulary.build(keys[-800:].copy(), num_threads=1))
            tables[name] = replace(tables[name], pointer_map=grown)
        store.publish(tables)
    make, calls = frequencies.HostFile, itertools.count(1)

    def full(*arguments: Any) -> Any:
        if next(calls) in (2, 3):
            raise OSError(28, "No space left on device")
        return make(*arguments)

    monkeypatch.setattr(frequencies, "HostFile", full)
    loop.train(config, tmp_path / "run", show_progress=False)
    failed, moved = swaps(tmp_path / "run")
    assert failed["error"] == "[Errno 28] No space left on device"
    assert (moved["version"], moved["step"]) == (2, failed["step"] + 4), "two looks for each other try"
    (maps,) = runs.checkpoints(tmp_path / "run")[-1].glob("maps/*")
    counts, keys = read_folder(maps)[1]["C1"].frequencies, np.arange(800)[::-1]
    ids = np.concatenate([batch.ids["C1"].values for batch in read_criteo(log, max_rows=runs.TRAINED)]) % 1000
    before = np.bincount(ids[: moved["step"] * runs.BATCH_SIZE], minlength=1000)
    expected = np.bincount(ids, minlength=1000)[keys] - np.where(keys < 200, before[keys], 0)
    np.testing.assert_array_equal(counts, expected)  # type: ignore[arg-type]


def test_a_watch_needs_a_registry(log: Path) -> None:
    with pytest.raises(ValidationError, match="watch_every=5 needs url, the registry to watch"):
        runs.criteo_config(log, registry={"watch_every": 5})
