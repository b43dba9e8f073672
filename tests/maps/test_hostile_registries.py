"""Registries that are damaged or made by strangers, clocks that are wrong, disks that are full."""

import errno
import logging
import mmap
import os
import stat
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.forks import Fork, apart
from tests.support.hostile_registries import ATTACKS, attack
from tests.support.registries import Target
from tests.support.s3_server import s3_server
from tests.support.skewed_clocks import skewed_gcs
from tests.support.snapshots import snapshot
from torchrec_cce.errors import MapFileError, PublishConflictError, RegistryError
from torchrec_cce.maps import version_files
from torchrec_cce.maps.arrow_file import list_array
from torchrec_cce.maps.registry import Registry
from torchrec_cce.maps.store import open_store
from torchrec_cce.maps.store.local_store import LocalStore
from torchrec_cce.maps.version_files import VersionFiles


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry", cache=tmp_path / "cache")


def publish(registry: Registry, count: int = 1) -> None:
    for seed in range(count):
        registry.publish({"t_user": snapshot(seed)})


@pytest.mark.parametrize("number", range(2 * len(ATTACKS)))
def test_a_hostile_registry_does_no_harm(tmp_path: Path, number: int) -> None:
    assert attack(tmp_path, number) == []


def test_clocks_that_are_ahead_cost_publishers_time_and_nothing_else(tmp_path: Path) -> None:
    target = Target(url=str(tmp_path / "registry"), cache=tmp_path / "cache")
    outcome = apart(tmp_path / "job", skewed_gcs, target=target, publishers=2, collectors=1, gcs=4, seed=0)
    assert outcome.violations == []
    assert outcome.gcs == 4
    assert outcome.published >= 1


def test_whoever_is_taken_for_dead_cannot_publish(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(registry)
    whole = VersionFiles.are_whole

    def too_late(files: VersionFiles, entry: Any) -> bool:
        found = whole(files, entry)
        registry.gc(keep_last=1, debris_age=timedelta(0))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(VersionFiles, "are_whole", too_late)
        with pytest.raises(PublishConflictError, match="came first with a collect"):
            publish(registry)
    assert registry.verify() == []
    publish(registry)


def test_files_that_go_after_the_record_take_it_back(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an older release's `gc` does it."""

    def take(folder: int) -> None:
        append = registry._journal.append

        def and_then_lose(*states: Any) -> Any:
            after = append(*states)
            if states[1].action == "publish":
                registry._store.delete(states[1].versions[-1].folder)
            return after

        with monkeypatch.context() as patch:
            patch.setattr(registry._journal, "append", and_then_lose)
            with pytest.raises(RegistryError, match=rf"files of version {folder} .* was taken back"):
                publish(registry)

    take(1)
    assert (registry.state().versions, registry.state().current) == ((), None)
    publish(registry)
    take(3)
    assert registry.state().current == 2
    assert [entry.version for entry in registry.state().versions] == [2]
    assert registry.verify() == []


def test_age_is_told_by_the_clock_of_the_store(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(registry)
    with registry._store.writer("versions/00000002-0badcafe/0000.pointers.arrow") as sink:
        sink.write(memoryview(b"of a publisher at work"))

    class Ahead(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(hours=25)

    monkeypatch.setattr("torchrec_cce.maps.registry.datetime", Ahead)
    assert registry.gc(keep_last=1).debris == ()
    assert abs(registry._store.now() - datetime.now(timezone.utc)) < timedelta(seconds=10)


def test_a_full_disk_can_be_freed(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(registry, 3)
    create = LocalStore.create
    reserve = tmp_path / "registry" / "reserve"
    assert reserve.stat().st_size > 0

    def no_room(store: LocalStore, name: str, content: bytes) -> bool:
        if reserve.exists():
            raise RegistryError("full") from OSError(errno.ENOSPC, "No space left on device")
        return create(store, name, content)

    monkeypatch.setattr(LocalStore, "create", no_room)
    monkeypatch.setattr("torchrec_cce.maps.journal.time.sleep", lambda _: None)
    assert registry.gc(keep_last=1).versions == (1, 2)
    assert [entry.version for entry in registry.state().versions] == [3]
    assert reserve.exists(), "for the next time"


def test_the_log_is_cut_back_and_stays_whole(registry: Registry, tmp_path: Path) -> None:
    publish(registry)
    for _ in range(5):
        registry.pin(1)
        registry.pin(1, pinned=False)
    sleeper = registry.state()
    for _ in range(5):
        registry.pin(1)
        registry.pin(1, pinned=False)
    old = Registry(tmp_path / "registry", cache=tmp_path / "cache")
    seen = old.state()
    registry.gc(keep_last=1, keep_records=4)
    assert [record.sequence for record in registry.history()] == [18, 19, 20, 21]
    assert old.state() == seen == registry.state()
    assert registry.open().version == 1
    with pytest.raises(PublishConflictError, match="the log was cut back"):
        registry._journal.append(sleeper, replace(sleeper, action="pin", subject=1))
    assert [record.sequence for record in registry.history()] == [18, 19, 20, 21]
    publish(registry)
    assert registry.state().current == 2


def test_a_first_publisher_that_slept_while_the_log_was_cut(registry: Registry, tmp_path: Path) -> None:
    first = Registry(tmp_path / "registry", cache=tmp_path / "cache")
    append = first._journal.append

    def too_late(*states: Any) -> Any:
        publish(registry, 6)
        registry.gc(keep_last=9, keep_records=2)
        return append(*states)

    first._journal.append = too_late  # type: ignore[method-assign]
    with pytest.raises(PublishConflictError, match="the log was cut back"):
        publish(first)
    assert registry.state().current == 6
    assert registry.verify() == []


def test_strays_in_the_log_are_said_once(registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    publish(registry)
    (tmp_path / "registry" / "log" / "zz.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert registry.open().version == 1
            assert len(registry.history()) == 1
    assert caplog.text.count("'log/zz.json' is no record of the log") == 1
    publish(registry)


def test_a_mapping_that_was_written_to_before_shows_all_the_same(registry: Registry) -> None:
    """The system moves a file's times at the first write to a page, not at the next."""
    publish(registry)
    folder = registry.open().folder
    path = folder / "0000.frequencies.arrow"
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[-300] ^= 0  # dirty, and as before
        registry.open(verify="all")
        mapped[len(mapped) // 2] ^= 1
        with pytest.raises(MapFileError, match="frequencies"):
            registry.open()


def test_receipts_that_others_can_write_are_not_believed(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    publish(registry)
    registry.open()
    (folder,) = (tmp_path / "cache").iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    checked: list[str] = []
    monkeypatch.setattr(version_files, "check_file", lambda _path, entry: checked.append(entry.name))
    registry.open()
    assert checked == []
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    registry.open()
    assert len(checked) == 3
    assert "others can write there" in caplog.text


def test_receipts_of_before_codes_were_looked_at_are_not_believed(registry: Registry, tmp_path: Path) -> None:
    publish(registry)
    registry.open()
    (receipt,) = tmp_path.glob("cache/*/receipts/*.json")
    assert '"format": 2' in receipt.read_text()


def test_a_forked_process_uses_a_folder(registry: Registry) -> None:
    publish(registry)
    registry.open()
    child = Fork(_open_in_fork, registry)
    assert child.heard(20) == 1


def test_a_forked_process_says_why_it_has_no_object_store() -> None:
    store = open_store("memory:///")
    store.create("a", b"")
    child = Fork(_read_in_fork, store)
    said = child.heard(20)
    assert "was forked from one that has used an object store" in said
    assert "spawn" in said
    assert store.read("a") == b""


def _open_in_fork(registry: Registry, say: Any) -> None:
    say(registry.open(verify="all").version)


def _read_in_fork(store: Any, say: Any) -> None:
    try:
        say(store.read("a"))
    except RegistryError as error:
        say(str(error))


def test_remote_maps_are_digested_anew(tmp_path: Path) -> None:
    """And a map whose codes are too large is refused from there, too."""
    pointers = np.zeros((1000, 4), np.uint8)
    pointers[7, 3] = 50
    sound = snapshot()
    beyond = replace(sound, pointer_map=replace(sound.pointer_map, stored=list_array(pointers)))
    with s3_server() as server:
        registry = Registry(server.url("maps"), cache=tmp_path / "cache", **server.options)
        publish(registry)
        assert registry.verify() == []
        registry.publish({"t_user": beyond})
        (damage,) = registry.verify()
        assert str(damage).endswith(
            "'t_user': pointers of 50, which is not in 0..49; whoever wrote them was wrong, publish another version"
        )
        with pytest.raises(MapFileError, match=r"pointers of 50, which is not in 0\.\.49"):
            registry.open()
        registry.rollback(1)
        assert registry.open().version == 1
    assert not list((tmp_path / "cache").rglob("verify.*")), "nothing is left"
