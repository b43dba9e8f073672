"""Publishing, opening, rolling back and collecting, on a disk and on an S3 server: one contract for all stores."""

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.s3_server import S3Server, s3_server
from tests.support.snapshots import assert_same, pointer_map, snapshot, tables
from torchrec_cce.errors import ConfigError, MapFileError, PublishConflictError, RegistryError
from torchrec_cce.maps.registry import Registry
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.maps.vocabulary import Vocabulary

Open = Callable[..., Registry]


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(params=["disk", "s3"])
def connect(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """A new connection to one and the same, empty registry."""
    url, options = (tmp_path / "registry").as_uri(), {}
    (tmp_path / "registry").mkdir()
    if request.param == "s3":
        server = request.getfixturevalue("server")
        url, options = server.url(tmp_path.name), server.options

    def open_registry(cache: str = "cache") -> Registry:
        return Registry(url, cache=tmp_path / cache, **options)

    return open_registry


def publish(registry: Registry, seed: int, **arguments: object) -> int:
    return registry.publish({"t_user": snapshot(seed)}, **arguments).version  # type: ignore[arg-type]


def test_what_is_published_is_opened(connect: Open) -> None:
    written = tables()
    entry = connect().publish(written, checkpoint="runs/first", config_digest="f" * 64)
    opened = connect("elsewhere").open()
    assert (opened.version, entry.version, opened.entry) == (1, 1, entry)
    assert opened.manifest.provenance.checkpoint == "runs/first"
    assert opened.manifest.parent is None
    for name, table in written.items():
        assert_same(opened.tables[name], table)
        assert opened.tables[name].pointer_map.version == 1
    assert entry.num_bytes == sum(path.stat().st_size for path in opened.folder.glob("*.arrow")) + len(
        opened.manifest.to_json()
    )


def test_versions_history_and_the_current_one(connect: Open) -> None:
    registry = connect()
    assert [publish(registry, seed) for seed in range(3)] == [1, 2, 3]
    assert_same(registry.open(2).tables["t_user"], snapshot(1))
    state = connect().state()
    assert [(one.version, one.parent) for one in state.versions] == [(1, None), (2, 1), (3, 2)]
    assert registry.rollback(1).version == 1
    assert_same(connect().open().tables["t_user"], snapshot(0))
    assert publish(registry, 9) == 4, "no number is used twice"
    assert connect().manifest().parent == 1
    assert [(r.sequence, r.action, r.subject, r.current) for r in registry.history()] == [
        (1, "publish", 1, 1),
        (2, "publish", 2, 2),
        (3, "publish", 3, 3),
        (4, "rollback", 1, 1),
        (5, "publish", 4, 4),
    ]
    assert registry.history()[-1] == connect().state()


def test_an_empty_registry_and_versions_that_are_not_there(connect: Open) -> None:
    registry = connect()
    assert registry.state().versions == ()
    with pytest.raises(RegistryError, match="nothing has been published yet"):
        registry.open()
    assert registry.verify() == []
    assert registry.gc(keep_last=1).versions == ()
    publish(registry, 0)
    publish(registry, 1)
    for action in (registry.open, registry.rollback, registry.pin, registry.manifest, registry.verify):
        with pytest.raises(RegistryError, match="there is no version 7; there are 1, 2"):
            action(7)
    with pytest.raises(RegistryError, match=r"version 2 .* is current already"):
        registry.rollback(2)
    with pytest.raises(ConfigError, match="no tables"):
        registry.publish({})
    with pytest.raises(ConfigError, match="keep_last=0"):
        registry.gc(keep_last=0)


def test_of_two_publishers_one_wins(connect: Open) -> None:
    one, other = connect(), connect()
    publish(one, 0)
    base = one.open().version
    assert publish(other, 1, parent=base) == 2
    with pytest.raises(PublishConflictError, match=r"made from version 1, but current is version 2 \(manifest "):
        publish(one, 2, parent=base)
    assert [v.version for v in one.state().versions] == [1, 2]

    # And where both looked before either had written: the second finds the record taken.
    before = one.state()
    one._journal.append(before, replace(before, action="pin", subject=1))
    with pytest.raises(PublishConflictError, match="came first with a pin of version 1; current is now version 2"):
        other._journal.append(before, replace(before, action="unpin", subject=1))
    assert one.state().action == "pin"


def test_a_loser_leaves_no_files(connect: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = connect(), connect()
    publish(one, 0)
    append = other._journal.append

    def too_late(*states: object) -> object:
        publish(one, 1)
        return append(*states)  # type: ignore[arg-type]

    monkeypatch.setattr(other._journal, "append", too_late)
    with pytest.raises(PublishConflictError, match="current is now version 2"):
        publish(other, 2)
    assert_same(other.open().tables["t_user"], snapshot(1))
    assert one.gc(keep_last=9, debris_age=timedelta(0)).debris == ()


def test_gc_keeps_current_pinned_and_last(connect: Open) -> None:
    registry = connect()
    for seed in range(6):
        publish(registry, seed)
    registry.pin(2)
    registry.rollback(3)
    preview = registry.gc(keep_last=1, dry_run=True)
    assert [v.version for v in registry.state().versions] == [1, 2, 3, 4, 5, 6]
    done = registry.gc(keep_last=1)
    assert done == preview
    assert done.versions == (1, 4, 5)
    assert [(v.version, v.pinned) for v in registry.state().versions] == [(2, True), (3, False), (6, False)]
    for version in (2, 3, 6):
        assert_same(connect("new").open(version).tables["t_user"], snapshot(version - 1))
    with pytest.raises(RegistryError, match="there is no version 4; there are 2, 3, 6"):
        registry.open(4)
    registry.pin(2, pinned=False)
    assert registry.gc(keep_last=1).versions == (2,)
    assert publish(registry, 7) == 7


def test_gc_takes_debris_of_its_age_only(connect: Open) -> None:
    registry = connect()
    publish(registry, 0)
    with registry._store.writer("versions/00000002-0badcafe/0000.pointers.arrow") as sink:
        sink.write(memoryview(b"what a publisher that died has left"))
    assert registry.gc(keep_last=1).debris == ()
    assert registry.gc(keep_last=1, debris_age=timedelta(0), dry_run=True).debris == ("versions/00000002-0badcafe",)
    assert registry.gc(keep_last=1, debris_age=timedelta(0)).num_bytes == 35
    assert registry.gc(keep_last=1, debris_age=timedelta(0)).debris == ()
    assert registry.verify() == []


def test_files_that_are_gone_are_damage(connect: Open) -> None:
    registry = connect()
    publish(registry, 0)
    publish(registry, 1)
    first, second = registry.state().versions
    registry._store.delete(f"{first.folder}/0000.weights.arrow")
    registry._store.delete(second.folder)
    with pytest.raises(MapFileError, match=r"weights\.arrow: no such (file|object)"):
        connect("other").open(1)
    with pytest.raises(MapFileError, match=r"manifest\.json: no such object, but the journal names it"):
        connect("other").open()
    assert ["weights" in str(one) for one in registry.verify()] == [True, False]


def test_a_version_that_is_collected_while_it_is_opened(connect: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = connect()
    publish(registry, 0)
    publish(registry, 1)
    read = registry._store.read

    def too_late(name: str) -> bytes:
        if name.endswith("manifest.json"):
            connect().gc(keep_last=1)
        return read(name)

    monkeypatch.setattr(registry._store, "read", too_late)
    with pytest.raises(RegistryError, match=r"manifest\.json: no such object; the version was collected"):
        registry.open(1)


def test_publishing_does_not_need_a_sound_predecessor(connect: Open, caplog: pytest.LogCaptureFixture) -> None:
    registry = connect()
    publish(registry, 0)
    registry._store.delete(registry.state().versions[0].folder)
    assert publish(registry, 1) == 2
    assert "churn is not recorded" in caplog.text
    assert registry.manifest().tables["t_user"].churn is None


def test_diff_and_churn(connect: Open) -> None:
    registry = connect()
    first = snapshot(0)
    registry.publish({"t_user": first, "t_old": snapshot(1)})
    pointers = first.pointer_map.stored_view.copy()
    pointers[:100, 0] = (pointers[:100, 0] + 1) % 50
    changed = snapshot(0, of=first.pointer_map.clustered(pointers, first.pointer_map.helper_hash))
    registry.publish({"t_user": changed, "t_new": snapshot(2)})
    tables = registry.diff(1, 2)
    assert tables["t_old"] is tables["t_new"] is None
    same = tables["t_user"]
    assert same is not None
    assert (same.share_changed, same.num_common, same.num_added, same.num_removed) == (100 / 4000, 1000, 0, 0)
    assert registry.manifest().tables["t_user"].churn == 100 / 4000
    assert registry.manifest().tables["t_new"].churn is None


def test_watch_yields_what_becomes_current(connect: Open) -> None:
    registry = connect()
    publish(registry, 0)
    seen = []
    reached = threading.Event()

    def follow() -> None:
        for opened in itertools.islice(connect().watch(1, interval_s=0.01), 2):
            seen.append((opened.version, opened.tables["t_user"].pointer_map.digest))
            reached.set()

    thread = threading.Thread(target=follow)
    thread.start()
    publish(registry, 1)
    assert reached.wait(20)
    registry.rollback(1)
    thread.join(20)
    assert not thread.is_alive()
    assert seen == [(2, pointer_map(1).digest), (1, pointer_map(0).digest)]


def flip(path: Path, share: float = 0.6) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * share)] ^= 1
    path.write_bytes(content)


def test_copies_follow_the_registry(connect: Open, tmp_path: Path) -> None:
    """Versions that were collected leave the cache too; those it has are not fetched again."""
    registry = connect()
    for seed in range(3):
        publish(registry, seed)
        connect().open()
    registry.gc(keep_last=1)
    registry.open()
    names = {path.name.split(".")[0] for path in (tmp_path / "cache").glob("*/*/*")}
    assert names == {registry.state().versions[0].folder.removeprefix("versions/")}


# what only a disk shows


@pytest.fixture
def disk(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry", cache=tmp_path / "cache")


FILES = ["0000.pointers.arrow", "0000.weights.arrow", "0000.frequencies.arrow", "manifest.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("opened_before", [False, True])
def test_one_flipped_bit(disk: Registry, tmp_path: Path, file: str, opened_before: bool) -> None:
    publish(disk, 0)
    path = tmp_path / "registry" / disk.state().versions[0].folder / file
    times = path.stat()
    if opened_before:
        disk.open()
    flip(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # a change that hides its time is one all the same
    with pytest.raises(MapFileError, match=file):
        disk.open()
    (damage,) = disk.verify(1)
    assert file in str(damage)
    assert disk.verify() == [damage] or str(disk.verify()[0]) == str(damage)
    publish(disk, 1)
    with pytest.raises(MapFileError, match=file):
        disk.rollback(1)
    assert disk.open().version == 2


def test_a_damaged_journal_is_an_error(disk: Registry, tmp_path: Path) -> None:
    publish(disk, 0)
    publish(disk, 1)
    newest = sorted((tmp_path / "registry" / "log").iterdir())[-1]
    content = newest.read_bytes()
    flip(newest)
    for action in (disk.open, disk.state, disk.verify):
        with pytest.raises(MapFileError, match=newest.name):
            action()
    with pytest.raises(MapFileError):
        publish(disk, 2)
    newest.write_bytes(content)
    newest.rename(newest.with_name("00000000000000000007.json"))
    with pytest.raises(MapFileError, match="holds record 2; the log is damaged"):
        Registry(tmp_path / "registry").state()


def test_verified_files_are_not_read_again(disk: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchrec_cce.maps import version_files

    checked = []
    check = version_files.check_file
    monkeypatch.setattr(
        version_files, "check_file", lambda path, entry: (checked.append(entry.name), check(path, entry))
    )
    publish(disk, 0)
    for verify, expected in (("changed", 3), ("changed", 0), ("all", 3)):
        checked.clear()
        disk.open(verify=verify)  # type: ignore[arg-type]
        assert len(checked) == expected
    folder = disk.open().folder
    os.utime(folder / "0000.weights.arrow")
    checked.clear()
    disk.open()
    assert checked == ["0000.weights.arrow"]


def test_two_openers_map_the_same_file(disk: Registry) -> None:
    publish(disk, 0)
    folders = {disk.open().folder, disk.open().folder}
    assert len(folders) == 1
    view = disk.open().tables["t_user"].pointer_map.stored_view
    assert not view.flags.writeable
    assert not view.flags.owndata


@pytest.mark.parametrize(
    "read",
    [
        Registry.state,
        Registry.history,
        Registry.open,
        Registry.manifest,
        Registry.verify,
        lambda registry: registry.diff(1, 2),
        lambda registry: registry.rollback(1),
        lambda registry: registry.pin(1),
        lambda registry: registry.gc(keep_last=1),
    ],
)
def test_a_folder_that_is_not_there_is_said_so_and_not_made(tmp_path: Path, read: Callable[[Registry], Any]) -> None:
    registry = Registry(tmp_path / "regsitry", cache=tmp_path / "cache")
    with pytest.raises(RegistryError, match=r"regsitry: there is no such folder; .*`torchrec-cce maps publish`"):
        read(registry)
    with pytest.raises(PublishConflictError, match="made from version 3, but current is nothing"):
        registry.publish({"t_user": snapshot(0)}, parent=3)
    assert list(tmp_path.iterdir()) == []


def test_the_first_version_makes_the_folder(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "new" / "registry", cache=tmp_path / "cache")
    with pytest.raises(RegistryError, match="there is no such folder"):
        registry.state()
    registry.publish({"t_user": snapshot(0)})
    assert registry.state().current == 1


def test_a_grown_vocabulary_is_compared_by_raw_id(disk: Registry) -> None:
    keys = np.array([10, 20, 30])
    old = pointer_map(0, num_ids=3, vocabulary=Vocabulary.build(keys), unseen="hash")
    grown = old.with_vocabulary(Vocabulary.build(np.array([40, 30, 10])))
    disk.publish({"t_user": snapshot(0, of=old, num_embeddings=100)})
    disk.publish({"t_user": snapshot(0, of=grown, num_embeddings=100)})
    change = disk.diff(1, 2)["t_user"]
    assert change is not None
    assert (change.share_changed, change.num_common, change.num_added, change.num_removed) == (0.0, 2, 1, 1)


def test_snapshots_of_all_kinds_survive_a_second_trip(disk: Registry) -> None:
    """What was opened can be published again, from its memory maps."""
    disk.publish(tables())
    opened = disk.open().tables
    disk.publish(opened)
    again: dict[str, TableSnapshot] = dict(disk.open(2).tables)
    for name, table in tables().items():
        assert_same(again[name], table)
    assert all(one.churn == 0 for one in disk.manifest(2).tables.values())
