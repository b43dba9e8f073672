"""Named objects on a disk or in an object store: the little that a registry asks of either. Here alone is obstore."""

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from torchrec_cce.errors import CCEError, RegistryError
from torchrec_cce.extras import require
from torchrec_cce.files.atomic import flush
from torchrec_cce.files.digest import sha256_of
from torchrec_cce.maps.arrow_file import Sink

_READ_BYTES = 4 << 20
_PART_BYTES = 8 << 20
_PARTS_AT_A_TIME = 2
"""A writer holds at most this many parts: memory, against throughput to a far store."""


@dataclass(frozen=True, kw_only=True)
class StoredObject:
    name: str
    num_bytes: int
    modified: datetime
    etag: str | None = None
    """What the store calls this content; None for a file."""


class Storage:
    """A folder of objects. Every write is of a whole object, which appears complete or not at all.

    Args:
        url: a local path, or `file://`, `s3://`, `gs://`, `az://` and whatever else obstore knows. Credentials and
            endpoints come from the environment, as each cloud's own tools read them.
        options: for obstore's `from_url`: `config`, `client_options`, `retry_config`, `credential_provider`.

    Raises:
        RegistryError: no store of this kind, or it cannot be set up. Of all that reads: there is no such folder.
        MissingExtraError: obstore is not installed.
    """

    def __init__(self, url: str | Path, **options: Any) -> None:
        self._obstore = require("obstore", "registry")
        self._options = options
        self.local_root: Path | None = None
        """Where the objects are files; None in an object store."""
        text = str(url)
        if "://" not in text or text.startswith("file://"):
            self.local_root = Path(unquote(text.removeprefix("file://")) if "://" in text else text).absolute()
            text = self.local_root.as_uri()
        self.url = text
        if self.local_root is None:
            with self._errors("set up"):
                self._store  # noqa: B018  so that a wrong URL is known at once

    @property
    def exists(self) -> bool:
        """Whether there is a folder to read from. It is made when the first object is written."""
        return self.local_root is None or self.local_root.is_dir()

    @cached_property
    def _store(self) -> Any:
        stores = require("obstore.store", "registry")
        if self.local_root is None:
            return stores.from_url(self.url, **self._options)
        if not self.exists:
            raise RegistryError(
                f"{self.url}: there is no such folder; check the name, or begin a registry with "
                "`torchrec-cce maps publish`"
            )
        return stores.LocalStore(self.local_root, automatic_cleanup=True)

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError, RegistryError."""
        with self._errors(f"read {name}"):
            return bytes(self._obstore.get(self._store, name).bytes())

    def create(self, name: str, content: bytes) -> bool:
        """Write a small object durably unless there is one of that name. Returns whether it was written.

        Raises:
            RegistryError: the store did not answer; the object may or may not be there.
        """
        with self._errors(f"create {name}"):
            if self.local_root is not None:
                return _create_file(self.local_root / name, content)
            try:
                self._obstore.put(self._store, name, content, mode="create")
            except self._obstore.exceptions.AlreadyExistsError:
                return False
            return True

    def writer(self, name: str) -> AbstractContextManager[Sink]:
        """Write an object of any size, front to back, in bounded memory."""

        @contextmanager
        def open_sink() -> Iterator[Sink]:
            with self._errors(f"write {name}"):
                if self.local_root is not None:
                    self.local_root.mkdir(parents=True, exist_ok=True)
                with self._obstore.open_writer(
                    self._store, name, buffer_size=_PART_BYTES, max_concurrency=_PARTS_AT_A_TIME
                ) as sink:
                    yield sink

        return open_sink()

    def find(self, name: str) -> StoredObject | None:
        """An object, None if there is none of that name."""
        with self._errors(f"look for {name}"), suppress(FileNotFoundError):
            if self.local_root is None:
                return _stored_object(self._obstore.head(self._store, name))
            stat = (self.local_root / name).stat()
            modified = datetime.fromtimestamp(stat.st_mtime, timezone.utc)
            return StoredObject(name=name, num_bytes=stat.st_size, modified=modified)
        return None

    def open_file(self, name: str) -> pa.NativeFile:
        """An object as a file to read at any place; only what is read is fetched. Raises as `read`."""
        with self._errors(f"read {name}"):
            if self.local_root is not None:
                return pa.OSFile(str(self.local_root / name))
            return pa.PythonFile(_Reader(self, name, self._obstore.open_reader(self._store, name)), mode="r")

    def download(self, name: str, path: Path) -> str:
        """Copy an object to a local file in bounded memory. Returns its SHA-256 (hex). Raises as `read`."""
        content = hashlib.sha256()
        with self._errors(f"read {name}"), path.open("wb") as file:
            for part in self._obstore.get(self._store, name).stream(min_chunk_size=_READ_BYTES):
                content.update(part)
                file.write(part)
        return content.hexdigest()

    def objects(self, folder: str, *, after: str | None = None) -> list[StoredObject]:
        """All objects in `folder` ("" is the root) and below, in the order of their names; those after `after` only."""
        with self._errors(f"list {folder}"):
            found = [
                _stored_object(meta)
                for page in self._obstore.list(self._store, f"{folder}/" if folder else None, offset=after)
                for meta in page
            ]
        return sorted(found, key=lambda one: one.name)

    def sha256(self, name: str) -> str:
        """SHA-256 (hex) of an object, read in bounded memory. Raises as `read`."""
        content = hashlib.sha256()
        with self._errors(f"read {name}"):
            if self.local_root is not None:
                return sha256_of(self.local_root / name)
            for part in self._obstore.get(self._store, name).stream(min_chunk_size=_READ_BYTES):
                content.update(part)
        return content.hexdigest()

    def delete(self, name: str) -> None:
        """Delete an object, or a folder with whatever is in it."""
        with self._errors(f"delete {name}"):
            if self.local_root is None:
                self._obstore.delete(self._store, [name, *(one.name for one in self.objects(name))])
            elif (self.local_root / name).is_dir():
                shutil.rmtree(self.local_root / name, ignore_errors=True)
            else:
                (self.local_root / name).unlink(missing_ok=True)

    def flush(self, name: str) -> None:
        """Force an object, or all in a folder, to the disk. An object store has done that when a write returns."""
        if self.local_root is None:
            return
        path = self.local_root / name
        with self._errors(f"flush {name}"):
            for item in (*path.rglob("*"), path, *path.relative_to(self.local_root).parents):
                flush(self.local_root / item)

    def leftovers(self) -> list[StoredObject]:
        """What writers that were killed left and `objects` does not show: unfinished files and empty folders.

        Only a disk shows them. An object store drops unfinished uploads by a rule of the bucket's life cycle.
        """
        if self.local_root is None:
            return []
        found = []
        # Unlike `rglob`, `walk` passes over a folder that its publisher or another `gc` deletes meanwhile.
        for folder, folders, files in os.walk(self.local_root):
            paths = [Path(folder, file) for file in files if "#" in file]
            if not folders and not files and Path(folder) != self.local_root:
                paths.append(Path(folder))
            for path in paths:
                with suppress(FileNotFoundError):  # its writer may be alive, and done with it
                    stat = path.stat()
                    name = path.relative_to(self.local_root).as_posix()
                    modified = datetime.fromtimestamp(stat.st_mtime, timezone.utc)
                    found.append(StoredObject(name=name, num_bytes=stat.st_size, modified=modified))
        return found

    @contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        """FileNotFoundError and our own errors as they are; what else a store says, as a RegistryError of one line."""
        try:
            yield
        except (FileNotFoundError, CCEError):
            raise
        except (self._obstore.exceptions.BaseError, OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RegistryError(f"{self.url}: cannot {action}: {reason}") from error


class _Reader:
    """obstore's reader as the file object that Arrow wants; its errors are ours."""

    closed = False

    def __init__(self, storage: Storage, name: str, reader: Any) -> None:
        self._storage = storage
        self._name = name
        self._reader = reader

    def read(self, size: int = -1) -> bytes:
        with self._storage._errors(f"read {self._name}"):
            return bytes(self._reader.read(None if size < 0 else size))

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with self._storage._errors(f"read {self._name}"):
            return int(self._reader.seek(offset, whence))

    def tell(self) -> int:
        return int(self._reader.tell())

    def size(self) -> int:
        return int(self._reader.size)

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True


def _stored_object(meta: Any) -> StoredObject:
    return StoredObject(
        name=meta["path"], num_bytes=meta["size"], modified=meta["last_modified"], etag=meta.get("e_tag")
    )


def _create_file(path: Path, content: bytes) -> bool:
    """On the disk before it has its name: no power cut leaves a named file that is empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unnamed = path.with_name(f"{path.name}#{secrets.token_hex(4)}")
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
