"""The registry against killed processes, crowds, failing stores and damaged files."""

import logging
import random
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from itertools import islice
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from tests.support.contention import begin, crowd, lost_updates, open_at_once
from tests.support.forks import apart
from tests.support.kills import NUM_IDS, kill_publishers
from tests.support.registries import Recipe, Target, content, damage, flip, flipped, strays
from tests.support.s3_server import FLAKY, Faults, S3Server, s3_server
from torchrec_cce.errors import MapFileError, RegistryError
from torchrec_cce.maps.registry import MapVersion, Registry
from torchrec_cce.maps.version_files import VersionFiles

SMALL = Recipe(seed=1, num_ids=100)
KINDS = ("0000.pointers", "0001.pointers", "0001.weights", "0001.slots", "0001.frequencies")


@pytest.fixture(scope="module")
def running_server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def server(running_server: S3Server) -> Iterator[S3Server]:
    yield running_server
    running_server.recover()


@pytest.fixture
def disk(tmp_path: Path) -> Target:
    return Target(url=str(tmp_path / "registry"), cache=tmp_path / "cache")


@pytest.fixture
def s3(server: S3Server, tmp_path: Path) -> Target:
    return Target(url=server.url(tmp_path.name), cache=tmp_path / "cache", options=server.options)


def publish(registry: Registry, recipe: Recipe = SMALL) -> int:
    return registry.publish(recipe.tables(), checkpoint=recipe.note).version


def assert_whole(opened: MapVersion, recipe: Recipe = SMALL) -> None:
    assert Recipe.noted_in(opened.manifest) == recipe
    assert content(opened.tables) == content(recipe.tables())


def assert_clean_after_gc(registry: Registry, root: Path | None, recipe: Recipe) -> None:
    """All is whole, and `gc` leaves the versions that it keeps, the log, and nothing else."""
    assert damage(registry) == []
    registry.gc(keep_last=3, debris_age=timedelta(0))
    assert len(registry.state().versions) == 3
    assert strays(registry, root) == set()
    assert_whole(registry.open(verify="all"), recipe)


def test_killed_publishers_on_a_disk(disk: Target, tmp_path: Path) -> None:
    outcome = apart(tmp_path / "job", kill_publishers, target=disk, kills=40, seed=0)
    assert (outcome.torn, outcome.refused) == ([], 0)
    assert outcome.kills == 40
    assert outcome.inside >= 20
    assert_clean_after_gc(disk.open(), Path(disk.url), outcome.recipe)


def test_killed_publishers_on_a_store_that_fails(s3: Target, server: S3Server, tmp_path: Path) -> None:
    server.fail(FLAKY)
    outcome = apart(tmp_path / "job", kill_publishers, target=s3, kills=15, seed=0)
    assert outcome.torn == []
    assert outcome.inside >= 5
    server.recover()
    assert_clean_after_gc(s3.open(), None, outcome.recipe)


def test_a_crowd_on_a_disk(disk: Target, tmp_path: Path) -> None:
    begin(disk)
    tally = apart(tmp_path / "job", crowd, target=disk, publishers=8, readers=8, seconds=5, seed=0)
    assert (tally.torn, lost_updates(disk.open(), tally), tally.uncertain) == ([], [], set())
    assert len(tally.published) >= 5
    assert tally.conflicts >= 5
    assert tally.opens >= 50


def test_a_crowd_on_a_store_that_fails(s3: Target, server: S3Server, tmp_path: Path) -> None:
    begin(s3)
    server.fail(FLAKY)
    tally = apart(tmp_path / "job", crowd, target=s3, publishers=3, readers=3, seconds=4, seed=0)
    server.recover()
    assert (tally.torn, lost_updates(s3.open(), tally)) == ([], [])
    assert len(tally.published) >= 3
    assert tally.conflicts >= 3
    assert tally.opens >= 10


@pytest.mark.parametrize("fault", ["refused", "unanswered", "stalled_before", "stalled_after"])
def test_a_record_that_fails_once_is_written_once(s3: Target, server: S3Server, fault: str) -> None:
    registry = s3.open()
    publish(registry)
    server.fail(Faults(**{fault: 1.0}, only="^PUT .*/log/", times=1))  # type: ignore[arg-type]
    fresh = SMALL.derived(2)
    assert publish(registry, fresh) == 2
    server.recover()
    assert [one.subject for one in registry.history()] == [1, 2]
    assert damage(registry) == []
    assert_whole(s3.open().open(), fresh)


def test_a_version_that_is_collected_while_it_is_opened(disk: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = disk.open()
    publish(registry)
    publish(registry, SMALL.derived(2))
    bring = VersionFiles.bring

    def bring_too_late(*args: Any, **arguments: Any) -> Path:
        disk.open().gc(keep_last=1)
        return bring(*args, **arguments)

    monkeypatch.setattr(VersionFiles, "bring", bring_too_late)
    with pytest.raises(RegistryError, match=r"version 1 .* was collected while it was opened"):
        registry.open(1)


def test_a_record_whose_answer_is_always_lost(s3: Target, server: S3Server) -> None:
    registry = s3.open()
    publish(registry)
    server.fail(Faults(unanswered=1.0, only="^PUT .*/log/"))
    fresh = SMALL.derived(2)
    assert publish(registry, fresh) == 2, "it reads what it could not be told"
    server.recover()
    assert [one.subject for one in registry.history()] == [1, 2]
    assert_whole(s3.open().open(), fresh)


def test_a_record_of_which_nothing_can_be_learned(s3: Target, server: S3Server) -> None:
    registry = s3.open()
    publish(registry)
    server.fail(Faults(unanswered=1.0, only="/log/0+2"))
    fresh = SMALL.derived(2)
    with pytest.raises(RegistryError, match="record 2 may or may not have been written"):
        publish(registry, fresh)
    server.recover()
    assert_whole(s3.open().open(), fresh)


@pytest.mark.parametrize("what", ["arrow", "manifest", "log"])
def test_a_publish_that_a_store_refuses_changes_nothing(s3: Target, server: S3Server, what: str) -> None:
    registry = s3.open()
    publish(registry)
    server.fail(Faults(refused=1.0, only=f"^PUT .*{what}"))
    began = time.monotonic()
    with pytest.raises(RegistryError):
        publish(registry, SMALL.derived(2))
    assert time.monotonic() - began < 10
    server.recover()
    assert len(registry.history()) == 1
    assert_whole(s3.open().open())
    registry.gc(keep_last=1, debris_age=timedelta(0))
    assert strays(registry, None) == set()


def test_a_store_that_is_down(s3: Target, server: S3Server) -> None:
    registry = s3.open()
    publish(registry)
    server.stop()
    try:
        for action in (lambda: publish(registry), registry.open, registry.state, registry.verify):
            began = time.monotonic()
            with pytest.raises(RegistryError, match=f"^{s3.url}: cannot "):
                action()
            assert time.monotonic() - began < 5
    finally:
        server.start()
    assert len(registry.history()) == 1
    assert_whole(registry.open())


def test_watching_outlives_a_store_that_is_down(s3: Target, server: S3Server, caplog: pytest.LogCaptureFixture) -> None:
    seen: Queue[MapVersion] = Queue()

    def watch() -> None:
        for opened in islice(s3.open().watch(interval_s=0.05), 2):
            seen.put(opened)

    registry = s3.open()
    publish(registry)
    watcher = threading.Thread(target=watch, daemon=True)
    with caplog.at_level(logging.WARNING):
        watcher.start()
        assert_whole(seen.get(timeout=10))
        server.stop()
        try:
            deadline = time.monotonic() + 10
            while "looking again" not in caplog.text and time.monotonic() < deadline:
                time.sleep(0.02)
        finally:
            server.start()
    assert "looking again in 0.05 s" in caplog.text
    fresh = SMALL.derived(2)
    publish(registry, fresh)
    assert_whole(seen.get(timeout=10), fresh)
    watcher.join(10)


def test_processes_that_open_at_once_fetch_and_map_one_copy(s3: Target, server: S3Server, tmp_path: Path) -> None:
    publish(s3.open(), Recipe(seed=1, num_ids=NUM_IDS))
    before = server.requests()
    mapped = apart(tmp_path / "job", open_at_once, target=s3, processes=2)
    fetched = {path: times for path, times in (server.requests() - before).items() if path.endswith(".arrow")}
    assert sorted(fetched.values()) == [1] * len(KINDS)
    (files, began, done), (other_files, other_began, other_done) = mapped
    assert max(began, other_began) < min(done, other_done)
    assert files == other_files
    assert len(files) == len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_object_is_refused(s3: Target, kind: str) -> None:
    registry = s3.open()
    publish(registry)
    name = f"{registry.state().versions[0].folder}/{kind}.arrow"
    good = registry._store.read(name)
    registry._store.delete(name)
    registry._store.create(name, flip(good, random.Random(kind)))
    with pytest.raises(MapFileError, match=rf"{kind}\.arrow: its SHA-256 is"):
        registry.open()
    assert [kind in str(error) for error in registry.verify()] == [True]
    registry._store.delete(name)
    registry._store.create(name, good)
    assert_whole(registry.open())


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_copy_is_found_and_fetched_again(s3: Target, kind: str) -> None:
    registry = s3.open()
    publish(registry)
    with flipped(registry.open().folder / f"{kind}.arrow", random.Random(kind)):
        with pytest.raises(MapFileError, match=rf"{kind}\.arrow: .* the file is damaged"):
            registry.open()
        assert registry.verify() == []
        assert_whole(registry.open())


@pytest.mark.parametrize("kind", [*(f"{kind}.arrow" for kind in KINDS), "manifest.json", "log"])
def test_one_flipped_bit_on_a_disk_is_found(disk: Target, kind: str) -> None:
    registry, rng = disk.open(), random.Random(kind)
    publish(registry)
    registry.open()
    root, folder = Path(disk.url), registry.state().versions[0].folder
    path = root / f"log/{1:020d}.json" if kind == "log" else root / folder / kind
    for _ in range(20):
        with flipped(path, rng):
            with pytest.raises(MapFileError, match=path.name):
                registry.open()
            if kind == "log":
                with pytest.raises(MapFileError, match=path.name):
                    registry.verify()
            else:
                assert [path.name in str(error) for error in registry.verify()] == [True]
        assert_whole(registry.open())
