"""Files and folders that appear whole or not at all, also when the process is killed while it writes them.

Who writes to a folder alone locks it with `files.lock`. Here is what that cannot do, a lock that several share.
"""

import errno
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pydantic_core


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling to write (a file, or a folder to create); rename it to `path` when the block ends well.

    What was at `path` before stays there until the rename: a file is replaced in one step, and a folder must not exist.
    On an exception the temporary is removed; after a kill it stays behind, hidden, and is never read.
    """
    make_folder(path.parent)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        yield temporary
        flush_all(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(FileNotFoundError):
                temporary.unlink()
        raise


def make_folder(path: Path) -> None:
    """Make a folder and those it lies in, unless they are there, so that no power cut takes their names again."""
    if not path.is_dir():
        make_folder(path.parent)
        try:
            path.mkdir(exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from error
        flush(path.parent)


def flush(path: Path) -> None:
    """Force a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_all(path: Path) -> None:
    """Force a file, or a folder with all that is in it, to the disk."""
    for item in (*path.rglob("*"), path):
        flush(item)


def write_json(path: Path, values: Any, *, indent: int | None = None, strict: bool = False) -> None:
    """Write plain values, and dataclasses of them, as JSON; the file appears whole.

    Args:
        indent: spaces for each level, where people read it; None writes one line.
        strict: write null for NaN and infinities. Else they are written as Python's `json` reads them again, although
            the standard has no such numbers.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(json_text(values, indent=indent, strict=strict))


def json_text(values: Any, *, indent: int | None = None, strict: bool = False) -> str:
    """What `write_json` writes."""
    text = json.dumps(pydantic_core.to_jsonable_python(values), indent=indent)
    if strict:
        text = json.dumps(json.loads(text, parse_constant=lambda _: None), indent=indent)
    return text


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
