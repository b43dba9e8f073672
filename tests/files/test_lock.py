"""Folders that one process at a time writes to, with real processes that are killed, stopped and forked."""

import multiprocessing
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.launch import Job
from torchrec_cce.errors import JobError
from torchrec_cce.files.holder import Holder
from torchrec_cce.files.lock import FolderLock, held_folder, read_holder


def hold(path: Path, forks: bool = False) -> None:
    with FolderLock(path, what="works here"):
        if forks:
            child = multiprocessing.get_context("fork").Process(target=signal.pause)
            child.start()
            path.with_name("child").write_text(str(child.pid))
        path.with_name("held").touch()
        signal.pause()


def holding(folder: Path, *, forks: bool = False) -> Job:
    job = Job(folder / "job", hold, folder / "lock", forks)
    job.wait_for((folder / "held").exists)
    return job


def end(job: Job) -> None:
    job.process.kill()
    job.process.join()


def test_the_second_is_told_who_the_first_is(tmp_path: Path) -> None:
    job = holding(tmp_path)
    with pytest.raises(
        JobError, match=rf"another process works here: process {job.pid} on .*, since 20.*; wait for it"
    ):
        FolderLock(tmp_path / "lock", what="works here")
    os.kill(job.pid, signal.SIGSTOP)  # a process that sleeps keeps it
    with pytest.raises(JobError, match="another process works here"):
        FolderLock(tmp_path / "lock", what="works here", patience_s=0.2)
    end(job)


def test_a_lock_of_a_process_that_was_killed_is_free(tmp_path: Path) -> None:
    end(holding(tmp_path))
    assert (tmp_path / "lock").exists()
    with FolderLock(tmp_path / "lock", what="works here") as lock:
        lock.check()
    assert not (tmp_path / "lock").exists()


def test_a_child_that_outlives_its_parent_does_not_hold_it(tmp_path: Path) -> None:
    job = holding(tmp_path, forks=True)
    child = int((tmp_path / "child").read_text())
    try:
        end(job)
        FolderLock(tmp_path / "lock", what="works here").release()
    finally:
        os.kill(child, signal.SIGKILL)


def test_who_wakes_up_after_its_successor_finds_out(tmp_path: Path) -> None:
    """As on a file server that has given the lock away, or after somebody has removed it."""
    first = FolderLock(tmp_path / "lock", what="works here")
    (tmp_path / "lock").unlink()
    with pytest.raises(JobError, match=r"no longer the process that works here: .*lock was removed"):
        first.check()
    with FolderLock(tmp_path / "lock", what="works here") as second:
        with pytest.raises(JobError, match=f"no longer the process that works here: it is process {os.getpid()}"):
            first.check()
        first.release()  # which leaves the other's alone
        second.check()


def test_a_file_that_is_damaged_can_be_taken(tmp_path: Path) -> None:
    (tmp_path / "lock").write_bytes(b"\xff{")
    with FolderLock(tmp_path / "lock", what="works here"):
        holder = read_holder(tmp_path / "lock")
    assert holder is not None
    assert holder.pid == os.getpid()


def test_a_holder_that_has_ended(tmp_path: Path) -> None:
    assert not Holder.this_process().has_ended
    job = holding(tmp_path)
    holder = read_holder(tmp_path / "lock")
    assert holder is not None
    assert not holder.has_ended
    end(job)
    assert holder.has_ended
    assert not Holder(host="far", pid=1, since="", place="another boot", started="1").has_ended


def take_turns(path: Path, seconds: float) -> int:
    """Count how often it was alone, and fail if it was not."""
    turns, deadline, owner = 0, time.monotonic() + seconds, path.with_name("owner")
    while time.monotonic() < deadline:
        with suppress(JobError), held_folder(path) as lock:
            assert [item.name for item in lock.folder.iterdir()] == [".lock"]
            owner.write_text(str(os.getpid()))
            (lock.folder / "file").touch()
            time.sleep(0.001)
            lock.check()
            assert owner.read_text() == str(os.getpid())
            turns += 1
    return turns


def test_many_take_turns(tmp_path: Path) -> None:
    """Each removes the folder and the lock in it, while the others are about to make and to take them."""
    jobs = [Job(tmp_path / f"{number}", take_turns, tmp_path / "made", 2.0) for number in range(3)]
    finished = [job.wait() for job in jobs]
    assert [each.code for each in finished] == [0, 0, 0], [each.stderr for each in finished]
    assert sum(each.value for each in finished) > 20
    assert not list(tmp_path.glob(".made*"))
