"""Locks on files and folders that a job has anyway: shared ones, and ones that leave no lock file beside its output.

Everything else uses `filelock`, which can do neither.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from torchrec_cce.errors import JobError


def hold(path: Path, *, shared: bool = False) -> ExitStack:
    """Lock a file or folder until the context that is returned ends, or its process does.

    Args:
        shared: with others that hold it in the same way; wait while somebody holds it alone.

    Raises:
        BlockingIOError: somebody else holds it, and this would not share it.
        FileNotFoundError: it is not there.
    """
    with ExitStack() as held:
        descriptor = os.open(path, os.O_RDONLY)
        held.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), path.stat()):
            raise FileNotFoundError(path)
        return held.pop_all()


@contextmanager
def held_folder(path: Path) -> Iterator[Path]:
    """Make a hidden folder beside `path`, in which one process makes what is then moved to `path`.

    Yields the folder, which is empty: what a job that was killed left in it is removed first. In the end it is removed.

    Raises:
        JobError: another process holds it: it is making `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.making")
    with _hold_new(hidden, path):
        try:
            for left in hidden.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield hidden
        finally:
            shutil.rmtree(hidden, ignore_errors=True)


def _hold_new(hidden: Path, path: Path) -> ExitStack:
    while True:
        hidden.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # whoever held it is done and has removed it
            try:
                return hold(hidden)
            except BlockingIOError as error:
                raise JobError(f"{path}: another job is making it, and holds {hidden}; wait for it") from error
