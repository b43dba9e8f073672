"""The reclustering job with its registry in an object store: the versions that a folder would hold."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.launch import command
from tests.support.nights import EASY, Night, assert_same_tensors, newest
from tests.support.s3_server import Faults, S3Server, s3_server
from tests.support.snapshots import assert_same
from torchrec_cce.errors import RegistryError
from torchrec_cce.jobs.recluster.job import recluster
from torchrec_cce.jobs.recluster.request import ReclusterJob, foresee
from torchrec_cce.jobs.recluster.work import RegistryMap
from torchrec_cce.maps.registry import Registry
from torchrec_cce.training.versions import snapshot_of_run


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def night(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Night:
    monkeypatch.setenv("TORCHREC_CCE_CACHE", str(tmp_path / "cache"))
    return Night(tmp_path, trained, thresholds=EASY)


@pytest.fixture
def remote(night: Night, server: S3Server) -> Registry:
    """In the store, with the run's maps as version 1."""
    registry = Registry(server.url(f"{night.folder.name}/maps"), cache=night.folder / "elsewhere", **server.options)
    registry.publish(snapshot_of_run(night.run).tables)
    return registry


def in_store(night: Night, remote: Registry, server: S3Server) -> ReclusterJob:
    return replace(night.job, registry=remote.url, options=server.options, output=night.folder / "remote")


def assert_same_versions(one: Registry, other: Registry) -> None:
    mine, theirs = one.open(), other.open()
    assert (mine.version, mine.entry.parent) == (theirs.version, theirs.entry.parent) == (2, 1)
    for name, table in mine.tables.items():
        assert_same(table, theirs.tables[name])


def test_a_run(night: Night, remote: Registry, server: S3Server) -> None:
    job = in_store(night, remote, server)
    assert foresee(job).parent == 1
    summary = recluster(job).summary
    assert (summary.status, summary.registry, summary.version) == ("published", remote.url, 2)
    night.recluster()
    assert_same_versions(remote, night.registry)
    assert_same_tensors(newest(job.output), newest(night.output))
    assert recluster(job).summary.status == "there already"
    found = RegistryMap(url=remote.url, version=2, options=server.options).open()
    for name, table in found.items():
        assert_same(table, remote.open(2).tables[name])


def test_maps_that_only_the_store_has(night: Night, remote: Registry, server: S3Server) -> None:
    """Workers fetch them by themselves."""
    bare = shutil.copytree(newest(night.run), night.folder / "bare")
    shutil.rmtree(bare / "maps")
    job = replace(in_store(night, remote, server), checkpoint=bare)
    summary = recluster(job).summary
    assert (summary.parent, summary.version) == (1, 2)
    night.recluster(checkpoint=bare)
    assert_same_versions(remote, night.registry)
    assert_same_tensors(job.output, night.output)


def test_credentials_are_not_written_down(night: Night, remote: Registry, server: S3Server) -> None:
    job = in_store(night, remote, server)
    recluster(job)
    secret = server.options["config"]["secret_access_key"]
    written = [path for path in job.output.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert written == []
    for shown in (job, RegistryMap(url=remote.url, version=1, options=server.options)):
        assert secret not in repr(shown)


def test_commands_read_the_environment(night: Night, remote: Registry, server: S3Server) -> None:
    config = server.options["config"]
    environment = {
        "AWS_ENDPOINT": config["endpoint"],
        "AWS_REGION": config["region"],
        "AWS_ACCESS_KEY_ID": config["access_key_id"],
        "AWS_SECRET_ACCESS_KEY": config["secret_access_key"],
        "AWS_ALLOW_HTTP": "true",
        "TORCHREC_CCE_REGISTRY": remote.url,
        "TORCHREC_CCE_CACHE": str(night.folder / "cache"),
    }

    def run(*arguments: str | Path) -> str:
        done = command(night.folder / "process", *arguments, **environment).wait()
        assert done.code == 0, done.stderr
        return done.stdout

    loose = [f"--{name}" for name in ("max-churn=1", "min-learned=0", "max-objective-ratio=2")]
    places = ["--checkpoint", night.run, "--output-checkpoint", night.folder / "remote"]
    said = json.loads(run("recluster", *places, "--workers", "1", *loose, "--json"))
    assert (said["status"], said["version"]) == ("published", 2)
    assert json.loads(run("maps", "list", "--json"))["current"] == 2
    night.recluster()
    assert_same_versions(remote, night.registry)


def test_a_store_that_does_not_answer(night: Night, remote: Registry, server: S3Server) -> None:
    """Before it begins, and when it publishes: nothing is left, and the job can be run again."""
    job = in_store(night, remote, server)
    for only in (".*", r"PUT .*manifest\.json"):
        server.fail(Faults(refused=1.0, only=only))
        try:
            with pytest.raises(RegistryError, match=job.registry):
                recluster(job)
        finally:
            server.recover()
        assert not job.output.exists()
        assert [one.version for one in remote.state().versions] == [1]
    assert recluster(job).summary.version == 2
