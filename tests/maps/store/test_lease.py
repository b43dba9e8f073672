"""Leases in an object store: processes that are killed and stopped, and their successors."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import Job
from tests.support.s3_server import S3Server, s3_server
from torchrec_cce.errors import JobError
from torchrec_cce.files.holder import Holder
from torchrec_cce.maps.store import lease as module
from torchrec_cce.maps.store import open_store
from torchrec_cce.maps.store.lease import Lease, check_lock, lock_folder

WHAT = "works here"
SHORT_S = 3.0


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEASE_S", SHORT_S)


def hold(url: str, options: dict[str, Any], folder: Path) -> list[str]:
    """Hold a lease, and try to write when `folder/go` appears: what it was told then."""
    module.LEASE_S = SHORT_S
    with lock_folder(open_store(url, **options), "work", what=WHAT) as lock:
        (folder / "held").write_text(lock.token)
        while not (folder / "go").exists():
            time.sleep(0.01)
        try:
            lock.check()
        except JobError as error:
            return [str(error)]
        return []


def holding(server: S3Server, folder: Path) -> tuple[str, Job]:
    url = server.url(folder.name)
    job = Job(folder / "job", hold, url, server.options, folder)
    job.wait_for(lambda: (folder / "held").exists() and bool((folder / "held").read_text()))
    return url, job


def test_one_at_a_time(server: S3Server, tmp_path: Path) -> None:
    url, job = holding(server, tmp_path)
    store = open_store(url, **server.options)
    with pytest.raises(JobError, match=f"another process works here: process {job.pid} on .*; wait for it, or end it"):
        lock_folder(store, "work", what=WHAT)
    check_lock(store, "work", (tmp_path / "held").read_text(), what=WHAT)  # as a worker does
    time.sleep(2 * SHORT_S)  # it is kept as long as its holder lives
    with pytest.raises(JobError, match="another process works here"):
        lock_folder(store, "work", what=WHAT)
    (tmp_path / "go").touch()
    assert job.wait().value == []
    assert store.objects("") == []
    lock_folder(store, "work", what=WHAT).release()


def test_killed_on_this_machine(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a process that is known to be dead."""
    monkeypatch.setattr(module, "LEASE_S", 600.0)
    url, job = holding(server, tmp_path)
    job.process.kill()
    job.process.join()
    lock_folder(open_store(url, **server.options), "work", what=WHAT).release()


def test_stopped_and_continued_elsewhere(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is taken for dead; what it does when it wakes up is refused, and its successor keeps the lease."""
    monkeypatch.setattr(Holder, "has_ended", False)  # as of a process on another machine
    url, job = holding(server, tmp_path)
    os.kill(job.pid, signal.SIGSTOP)
    store = open_store(url, **server.options)
    began = time.monotonic()
    with lock_folder(store, "work", what=WHAT) as lock:
        assert time.monotonic() - began < 3 * SHORT_S
        (tmp_path / "go").touch()
        os.kill(job.pid, signal.SIGCONT)
        (told,) = job.wait().value
        assert f"no longer the process that works here: it is process {os.getpid()} on" in told
        lock.check()
        with pytest.raises(JobError, match="no longer"):
            check_lock(store, "work", (tmp_path / "held").read_text(), what=WHAT)
    assert store.objects("") == []


def test_of_many_who_want_it_one_gets_it(server: S3Server, tmp_path: Path) -> None:
    url = server.url(tmp_path.name)
    jobs = [Job(tmp_path / f"{number}", hold, url, server.options, tmp_path) for number in range(4)]
    jobs[0].wait_for(lambda: (tmp_path / "held").exists() or not all(job.process.is_alive() for job in jobs))
    time.sleep(SHORT_S)
    (tmp_path / "go").touch()
    finished = [job.wait() for job in jobs]
    assert sorted(each.code for each in finished) == [0, 1, 1, 1]
    assert all("another process works here" in each.stderr for each in finished if each.code)


def test_a_disk_has_the_kernels_lock(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    with lock_folder(store, "work", what=WHAT) as lock:
        assert not isinstance(lock, Lease)
        check_lock(store, "work", lock.token, what=WHAT)
        with pytest.raises(JobError, match="no longer"):
            check_lock(store, "work", "another", what=WHAT)
