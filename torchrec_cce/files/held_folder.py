"""A hidden folder beside the one that a job is making, which one process holds."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from torchrec_cce.errors import JobError


@contextmanager
def held_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder on the file system of `path`, which is to be moved from there; removed in the end.

    What a job that was killed left in it is removed first.

    Raises:
        JobError: another process holds it: it is making `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.making")
    descriptor = _hold(hidden, path)
    try:
        for left in hidden.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield hidden
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        os.close(descriptor)


def _hold(hidden: Path, path: Path) -> int:
    """A descriptor of the folder, locked until it is closed or its process ends."""
    while True:
        hidden.mkdir(exist_ok=True)
        with ExitStack() as unless_held, suppress(FileNotFoundError):  # whoever held it is done and has removed it
            descriptor = os.open(hidden, os.O_RDONLY)
            unless_held.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise JobError(f"{path}: another job is making it, and holds {hidden}; wait for it") from error
            if os.path.samestat(os.fstat(descriptor), hidden.stat()):
                unless_held.pop_all()
                return descriptor
