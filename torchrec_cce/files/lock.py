"""Folders that one process at a time writes to, and how it notices that it is no longer that one.

The kernel keeps the lock: it is free when its process has ended, whatever ended it, and nobody has to remove a file. A
process that sleeps keeps it. Yet a file server that misses a client gives its locks to others, and people remove lock
files. Hence the token: whoever takes the lock writes a new one, and its holder looks for its own before it writes.
"""

import errno
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from weakref import WeakSet

from torchrec_cce.errors import JobError
from torchrec_cce.files.holder import Holder

LOCK = ".lock"
"""In a folder that is locked as a whole."""
_log = logging.getLogger(__name__)
_LOOK_EVERY_S = 0.05
_HAS_NONE = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


class FolderLock:
    """A lock on a folder, which is made if it is not there; held until it is released or its process has ended.

    Its file is removed when it is released. Processes that are forked meanwhile do not hold it.

    Args:
        path: of the lock's file, in the folder.
        what: what one process at a time does, for messages: "trains here".
        patience_s: how long to wait for another holder.

    Raises:
        JobError: another process holds it; the message names it.
    """

    def __init__(self, path: Path, *, what: str, patience_s: float = 0.0) -> None:
        self.path, self._what = path, what
        self._holder = Holder.this_process()
        self.token = self._holder.token
        self._descriptor: int | None = None
        deadline = time.monotonic() + patience_s
        while not self._take():
            if time.monotonic() > deadline:
                holder = read_holder(path) or "it has not said which"
                raise JobError(
                    f"{path.parent}: another process {what}: {holder}; wait for it, or end it. If it cannot be reached "
                    f"any more, remove {path}: then it can write nothing"
                )
            time.sleep(_LOOK_EVERY_S)
        _held.add(self)

    @property
    def folder(self) -> Path:
        return self.path.parent

    def check(self) -> None:
        """To be called before something is written.

        Raises:
            JobError: another process has taken the lock, or somebody has removed it.
        """
        check_token(self.path, self.token, what=self._what)

    def release(self) -> None:
        """Let others have the folder. Nothing happens if they have it already."""
        with suppress(JobError, OSError):  # a file that stays is free all the same
            self.check()
            self.path.unlink()
        self.close()

    def close(self) -> None:
        """Let go of the file, as a child of the holder does, and leave it as it is."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _take(self) -> bool:
        """False if another process has it."""
        while True:
            with suppress(FileNotFoundError):  # whoever held it is done and has removed it
                _make_folder(self.folder)
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
                try:
                    if not _lock(descriptor, self.path):
                        os.close(descriptor)
                        return False
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, self._holder.to_json(), 0)
                except OSError:
                    os.close(descriptor)
                    raise
                self._descriptor = descriptor
                return True

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def check_token(path: Path, token: str, *, what: str) -> None:
    """For a worker of the process that holds the lock at `path` with this token. Raises as `FolderLock.check`."""
    found = read_holder(path)
    if found is None or found.token != token:
        raise lost(str(path.parent), str(path), found, what)


def read_holder(path: Path) -> Holder | None:
    """Who holds the lock at `path`; None if nobody does, or is just about to."""
    try:
        return Holder.from_json(path.read_bytes())
    except FileNotFoundError:
        return None


def lost(folder: str, lock: str, found: Holder | None, what: str) -> JobError:
    """The error of a process that finds that its lock is another's."""
    now = f"{lock} was removed" if found is None else f"it is {found}"
    return JobError(f"{folder}: this is no longer the process that {what}: {now}. It has stopped writing")


@contextmanager
def held_folder(path: Path) -> Iterator[FolderLock]:
    """Make a hidden folder beside `path`, in which one process makes what is then moved to `path`.

    Yields the lock of the folder, which has nothing else: what a job that was killed left in it is removed first. In
    the end it is removed.

    Raises:
        JobError: another process holds it: it is making `path`.
    """
    lock = FolderLock(path.with_name(f".{path.name}.making") / LOCK, what=f"makes {path}")
    try:
        _empty(lock)
        yield lock
    finally:
        with suppress(JobError):
            lock.check()
            _empty(lock)
        lock.release()
        with suppress(OSError):  # the next one is in it
            lock.folder.rmdir()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        if not folder.exists():
            raise FileNotFoundError(folder) from error  # it was there, and another process has removed it
        if not folder.is_dir():
            raise


def _empty(lock: FolderLock) -> None:
    for left in lock.folder.iterdir():
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        elif left != lock.path:
            left.unlink()


def _lock(descriptor: int, path: Path) -> bool:
    """False if another process has it. Raises FileNotFoundError if the file was removed since it was opened."""
    try:
        flock(descriptor, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _HAS_NONE:
            raise
        _log.warning("%s: this file system has no locks (%s); run nothing twice in this folder", path, error.strerror)
    if not os.path.samestat(os.fstat(descriptor), path.stat()):
        raise FileNotFoundError(path)
    return True


_held: WeakSet[FolderLock] = WeakSet()


def _close_all() -> None:
    for lock in _held:
        lock.close()


# The kernel's lock is free when all who have its descriptor are gone. A worker may outlive the process that forked it.
os.register_at_fork(after_in_child=_close_all)
