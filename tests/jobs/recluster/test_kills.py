"""A job that is killed, or whose disk is full: nothing is left, and run again it ends the same."""

import os
import resource
import shutil
import signal
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from tests.support import nights
from tests.support.launch import Job
from tests.support.nights import Night, assert_same_tensors, at_the_moment, killable, newest
from tests.support.snapshots import assert_same
from torchrec_cce.maps.registry import Registry


def limited(job: Any, name: str) -> str:
    """As on a disk that is full from a certain moment on: no file may be longer than a kilobyte."""
    limit = (1 << 10, 1 << 10)
    with at_the_moment(name, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)):
        try:
            killable(job)
        except OSError as error:
            return str(error)
    return "done"


@pytest.mark.parametrize("name", ["copy_checkpoint", "unpack_frequencies", "cluster", "replace_tables", "flush_all"])
def test_a_full_disk(night: Night, name: str) -> None:
    """While it copies, clusters, writes the new tables, publishes."""
    job = replace(night.job, frequencies=nights.counts(night.folder, {"C1": 1000}))
    said = Job(night.folder / "process", limited, job, name).wait().value
    assert "File too large" in said, said
    night.assert_untouched()


def test_no_room_from_the_beginning(night: Night) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    with mock.patch.object(shutil, "disk_usage", return_value=usage), pytest.raises(OSError, match=r"1\.0 kB are free"):
        night.recluster()
    night.assert_untouched()


def test_killed_at_any_moment(night: Night) -> None:
    """And run again, until it is done: one version, the same output, and nothing else."""
    undisturbed = replace(night.job, registry=str(night.folder / "undisturbed"), output=night.folder / "reference")
    shutil.copytree(night.folder / "registry", night.folder / "undisturbed")
    took = Job(night.folder / "process", killable, undisturbed).wait().value
    rng = np.random.default_rng(0)
    kills = 0
    for number in range(8):
        job = Job(night.folder / "process", killable, night.job)
        job.process.join(float(rng.uniform(0.2, 1.0)) * took if number < 7 else None)
        kills += job.process.is_alive()
        job.process.kill()
        job.process.join()
        assert not night.output.exists() or set(night.versions) == {1, 2}
    assert night.recluster().summary.status == "there already"
    assert kills >= 3
    assert night.versions == [1, 2]
    assert night.registry.state().sequence == 2
    assert_same_tensors(newest(night.output), newest(night.folder / "reference"))
    theirs = Registry(night.folder / "undisturbed", cache=night.folder / "cache").open()
    for name, table in night.registry.open().tables.items():
        assert_same(table, theirs.tables[name])
    there = {path.name for path in night.folder.iterdir()}
    assert there == {"run", "registry", "cache", "process", "undisturbed", "reference", "output"}


def killed_before(job: Any, name: str) -> None:
    """SIGKILL to itself at a certain moment."""
    with at_the_moment(name, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        killable(job)


@pytest.mark.parametrize(("name", "versions"), [("write_summary", [1]), ("_give_name", [1, 2])])
def test_killed_around_publishing(night: Night, name: str, versions: list[int]) -> None:
    assert Job(night.folder / "process", killed_before, night.job, name).wait().code == -9
    assert night.versions == versions
    assert not night.output.exists()
    assert night.recluster().summary.status == ("published" if versions == [1] else "finished")
    assert night.versions == [1, 2]
    assert not list(night.folder.glob(".*"))
