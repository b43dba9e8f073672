"""The remap from and to an object store, and on a Ray cluster: the same bytes as on this machine."""

import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support.remap_folders import NAMES, Place, contents, refused, write_log
from tests.support.s3_server import Faults, S3Server, s3_server
from torchrec_cce.errors import ConfigError, DataFileError, RegistryError
from torchrec_cce.jobs.remap import job as remap_run
from torchrec_cce.jobs.remap.job import remap
from torchrec_cce.jobs.remap.output import read_manifest
from torchrec_cce.maps.registry import Registry
from torchrec_cce.maps.store import Store, open_store
from torchrec_cce.workers.inline import InlineEngine


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("TORCHREC_CCE_CACHE", str(tmp_path / "cache"))
    return Place(tmp_path)


def upload(folder: Path, storage: Store) -> None:
    for name, content in contents(folder).items():
        with storage.writer(name) as sink:
            sink.write(memoryview(content))


def download(storage: Store) -> dict[str, bytes]:
    return {one.name: storage.read(one.name) for one in storage.objects("")}


def test_an_object_store_holds_what_a_disk_does(
    place: Place, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remap_run, "engine_of", lambda *_, **__: InlineEngine(1))
    large = place.raw / "day=3" / "large.parquet"
    write_log(large, 7, rows=300_000, row_group_size=100_000)
    place.run("local", layout="words", helper="store")
    raw, out, registry = (server.url(f"{place.folder.name}/{name}") for name in ("raw", "out", "registry"))
    upload(place.raw, open_store(raw, **server.options))
    remote = Registry(registry, **server.options)
    remote.publish(Registry(place.registry).open().tables)

    def run(source: str = raw, target: str = out) -> remap_run.RemapReport:
        return remap(source, target, registry=registry, helper="store", inverse_check=True, options=server.options)

    report = run()
    assert (report.num_files, report.skipped_files) == (4, 0)
    there = open_store(out, **server.options)
    mine, local = download(there), contents(place.folder / "local")
    for name in (*NAMES, "day=3/large.parquet"):
        new, wanted = (pq.read_table(io.BytesIO(one[name])) for one in (mine, local))
        assert new.equals(wanted)  # their metadata name manifests of two registries
    assert read_manifest(there).num_rows == 303_000
    assert run().skipped_files == 4

    parts = server.url(f"{place.folder.name}/parts")
    assert run(f"{raw}/day=1/*.parquet", parts).num_files == 2
    one = server.url(f"{place.folder.name}/one")
    assert run(f"{raw}/{NAMES[2]}", one).num_files == 1
    assert "no such file" in refused(DataFileError, lambda: run(f"{raw}/none.parquet", one))
    assert "lie in one another" in refused(ConfigError, lambda: run(raw, f"{raw}/new"))


def test_an_upload_that_fails_leaves_no_object(place: Place, server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the job goes on once the store is back."""
    monkeypatch.setattr(remap_run, "engine_of", lambda *_, **__: InlineEngine(1))
    out = server.url(f"{place.folder.name}/out")

    def run() -> remap_run.RemapReport:
        return remap(str(place.raw), out, registry=str(place.registry), options=server.options)

    server.fail(Faults(refused=1.0, only=rf"PUT .*{NAMES[2]}"))
    try:
        assert f"cannot write {NAMES[2]}" in refused(RegistryError, run)
    finally:
        server.recover()
    there = open_store(out, **server.options)
    before = download(there)
    assert NAMES[2] not in before
    assert "_remap/manifest.json" not in before
    report = run()
    place.run("local", num_workers=1)
    assert download(there).keys() == contents(place.folder / "local").keys()
    assert {name: download(there)[name] for name in NAMES} == {
        name: contents(place.folder / "local")[name] for name in NAMES
    }
    assert report.skipped_files + 1 <= 3


def test_ray_writes_the_same_bytes(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    place.run("local", num_workers=2)
    place.run("ray", engine="ray", num_workers=2)
    assert contents(place.folder / "ray") == contents(place.folder / "local")
    assert place.run("ray", engine="local").skipped_files == 3


def test_what_comes_after_the_bucket_is_the_key(
    place: Place, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hive and Spark write `%3A` into names; nothing is decoded, neither in a folder nor in what is listed."""
    monkeypatch.setattr(remap_run, "engine_of", lambda *_, **__: InlineEngine(1))
    root = server.url(place.folder.name)
    bucket = open_store(root.rsplit("/", 1)[0], **server.options)
    folders = {"ts=2026-01-01 00%3A00%3A00": 3, "a%20b": 4, "a b": 5, "a?b#c": 6, "x[1]*": 7, "_x": 8}
    for folder, rows in folders.items():
        write_log(place.folder / "one.parquet", 1, rows=rows)
        content = (place.folder / "one.parquet").read_bytes()
        bucket.create(f"{place.folder.name}/log/{folder}/part-0.parquet", content)
    registry = place.registry

    def rows_of(source: str, target: str) -> int:
        return remap(f"{root}/{source}", f"{root}/{target}", registry=registry, options=server.options).num_rows

    for number, (folder, rows) in enumerate(folders.items()):
        assert rows_of(f"log/{folder}", f"out/{number}%20x") == rows
    assert rows_of("log/a%20b/part-0.parquet", "file") == 4
    assert rows_of("log", "all") == 3 + 4 + 5 + 6 + 7
    assert rows_of("log/a*b", "some") == 4 + 5
    written = {one.name.split("/")[2] for one in bucket.objects(f"{place.folder.name}/out")}
    assert written == {f"{number}%20x" for number in range(len(folders))}
