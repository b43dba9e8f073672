"""A folder of a disk as a store, by the file system alone: it also serves processes that were forked."""

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

import pyarrow as pa

from torchrec_cce.errors import RegistryError
from torchrec_cce.files.atomic import flush, make_folder
from torchrec_cce.files.cache import reserve
from torchrec_cce.maps.arrow_file import Sink
from torchrec_cce.maps.store.store import Store, StoredObject, in_one_line

_PIECE_BYTES = 4 << 20
_UNFINISHED = re.compile(r"#[0-9a-f]+$")
"""How the names of files end that a writer has not finished."""
_RESERVE = "reserve"
_RESERVE_BYTES = 1 << 20


class LocalStore(Store):
    """A folder. Only regular files are objects, or links to some.

    Args:
        url: a path or a `file://` URL. There need be no such folder until something is read.

    Raises:
        RegistryError: of all that reads: there is no such folder.
    """

    def __init__(self, url: str) -> None:
        self.root = Path(unquote(url.removeprefix("file://")) if "://" in url else url).absolute()
        self.url = self.root.as_uri()

    @property
    def exists(self) -> bool:
        return self.root.is_dir()

    def path(self, name: str = "") -> Path:
        return self.root / name

    def read(self, name: str) -> bytes:
        with self._errors(f"read {name}"), self._opened(name) as file:
            return file.read()

    def create(self, name: str, content: bytes) -> bool:
        with self._writing(f"create {name}"):
            return _create_file(self.root / name, content)

    @contextmanager
    def writer(self, name: str) -> Iterator[Sink]:
        path = self.root / name
        with self._writing(f"write {name}"):
            make_folder(path.parent)
            unfinished = _unfinished(path)
            try:
                with unfinished.open("wb") as file:
                    yield file
                os.replace(unfinished, path)
            finally:
                unfinished.unlink(missing_ok=True)

    def find(self, name: str) -> StoredObject | None:
        with self._errors(f"look for {name}"), suppress(FileNotFoundError):
            return self._stored(self.root / name)
        return None

    def open_file(self, name: str) -> pa.NativeFile:
        with self._errors(f"read {name}"):
            self._opened(name).close()
            return pa.OSFile(str(self.root / name))

    def download(self, name: str, path: Path) -> str:
        with path.open("wb") as file:
            return self._hashed(name, file)

    def objects(self, folder: str, *, after: str | None = None) -> list[StoredObject]:
        with self._errors(f"list {folder}"):
            self._check_exists()
            found = []
            for where, _, files in os.walk(self.root / folder, onerror=_unless_gone):
                paths = [Path(where, file) for file in files if not _UNFINISHED.search(file)]
                for path in paths:
                    if after is None or path.relative_to(self.root).as_posix() > after:
                        with suppress(FileNotFoundError):  # deleted meanwhile
                            found.append(self._stored(path))
        return sorted((stored for stored in found if stored is not None), key=lambda stored: stored.name)

    def sha256(self, name: str) -> str:
        return self._hashed(name)

    def delete(self, name: str) -> None:
        path = self.root / name
        with self._errors(f"delete {name}"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def flush(self, name: str) -> None:
        path = self.root / name
        with self._writing(f"flush {name}"):
            for item in (*path.rglob("*"), path, *path.relative_to(self.root).parents):
                flush(self.root / item)

    def leftovers(self) -> list[StoredObject]:
        found = []
        # Unlike `rglob`, `walk` passes over a folder that its publisher or another `gc` deletes meanwhile.
        for folder, folders, files in os.walk(self.root):
            paths = [Path(folder, file) for file in files if _UNFINISHED.search(file)]
            if not folders and not files and Path(folder) != self.root:
                paths.append(Path(folder))
            for path in paths:
                with suppress(FileNotFoundError):  # its writer may be alive, and done with it
                    found.append(self._described(path, path.lstat()))
        return found

    def now(self) -> datetime:
        probe = _unfinished(self.root / "clock")
        with self._writing("ask for the time"):
            try:
                with probe.open("wb") as file:
                    return _time(os.fstat(file.fileno()))
            finally:
                probe.unlink(missing_ok=True)

    def put_room_aside(self) -> None:
        with suppress(OSError), (self.root / _RESERVE).open("xb") as file:
            reserve(file, _RESERVE_BYTES)

    def give_room(self) -> None:
        (self.root / _RESERVE).unlink(missing_ok=True)

    def _check_exists(self) -> None:
        if not self.exists:
            raise RegistryError(
                f"{self.url}: there is no such folder; check the name, or begin a registry with "
                "`torchrec-cce maps publish`"
            )

    def _opened(self, name: str) -> BinaryIO:
        """A regular file to read: to open a pipe would wait for ever, and some devices have no end.

        Raises:
            OSError: it is none.
            FileNotFoundError: there is none.
        """
        self._check_exists()
        try:
            file = open(os.open(self.root / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115
        except NotADirectoryError as error:
            raise FileNotFoundError(name) from error
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise OSError(errno.EINVAL, "not a regular file", name)
        return file

    def _hashed(self, name: str, copy: BinaryIO | None = None) -> str:
        """SHA-256 (hex) of an object, of which `copy` gets all pieces."""
        content = hashlib.sha256()
        piece = memoryview(bytearray(_PIECE_BYTES))
        with self._errors(f"read {name}"), self._opened(name) as file:
            while length := file.readinto(piece):  # type: ignore[attr-defined]
                content.update(piece[:length])
                if copy is not None:
                    copy.write(piece[:length])
        return content.hexdigest()

    def _stored(self, path: Path) -> StoredObject | None:
        """None if it is no regular file. Raises FileNotFoundError."""
        try:
            found = path.stat()
        except NotADirectoryError:
            return None
        return self._described(path, found) if stat.S_ISREG(found.st_mode) else None

    def _described(self, path: Path, found: os.stat_result) -> StoredObject:
        name = path.relative_to(self.root).as_posix()
        return StoredObject(name=name, num_bytes=found.st_size, modified=_time(found))

    def _errors(self, action: str) -> AbstractContextManager[None]:
        return in_one_line(self.url, action, (OSError, ValueError))

    @contextmanager
    def _writing(self, action: str) -> Iterator[None]:
        """As `_errors`; and what is not there, while something is written, is what somebody else has deleted."""
        with self._errors(action):
            try:
                yield
            except FileNotFoundError as error:
                raise OSError("its folder has gone while it was written") from error


def _unfinished(path: Path) -> Path:
    """A name for `path` while it is written."""
    return path.with_name(f"{path.name}#{secrets.token_hex(4)}")


def _create_file(path: Path, content: bytes) -> bool:
    """On the disk before it has its name: no power cut leaves a named file that is empty."""
    make_folder(path.parent)
    unnamed = _unfinished(path)
    try:
        unnamed.write_bytes(content)
        flush(unnamed)
        os.link(unnamed, path)
    except FileExistsError:
        return False
    finally:
        unnamed.unlink(missing_ok=True)
    flush(path.parent)
    return True


def _unless_gone(error: OSError) -> None:
    """A folder that cannot be listed must not pass for an empty one."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _time(found: os.stat_result) -> datetime:
    return datetime.fromtimestamp(found.st_mtime, timezone.utc)
