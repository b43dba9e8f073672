"""Objects in S3, GCS, Azure and whatever else obstore reaches, and as files in a folder. Here alone is obstore."""

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from torchrec_cce.errors import CCEError, RegistryError
from torchrec_cce.extras import require
from torchrec_cce.files.atomic import flush, make_folder
from torchrec_cce.maps.arrow_file import Sink
from torchrec_cce.maps.sealed import sha256_of
from torchrec_cce.maps.store.store import Store, StoredObject

_READ_BYTES = 4 << 20
_PART_BYTES = 8 << 20
_PARTS_AT_A_TIME = 2
"""A writer holds at most this many parts: memory, against throughput to a far store."""


class ObjectStore(Store):
    """A prefix of a bucket. Arguments and errors: `open_store`."""

    def __init__(self, url: str, **options: Any) -> None:
        self._obstore = require("obstore", "registry")
        self.url = url
        self._options = options
        with self._errors("set up"):
            self._remote  # noqa: B018  so that a wrong URL is known at once

    @cached_property
    def _remote(self) -> Any:
        """What obstore's functions take as their store."""
        return require("obstore.store", "registry").from_url(self.url, **self._options)

    def read(self, name: str) -> bytes:
        with self._errors(f"read {name}"):
            return bytes(self._obstore.get(self._remote, name).bytes())

    def create(self, name: str, content: bytes) -> bool:
        with self._errors(f"create {name}"):
            try:
                self._obstore.put(self._remote, name, content, mode="create")
            except self._obstore.exceptions.AlreadyExistsError:
                return False
            return True

    @contextmanager
    def writer(self, name: str) -> Iterator[Sink]:
        with (
            self._errors(f"write {name}"),
            self._obstore.open_writer(
                self._remote, name, buffer_size=_PART_BYTES, max_concurrency=_PARTS_AT_A_TIME
            ) as sink,
        ):
            yield sink

    def find(self, name: str) -> StoredObject | None:
        with self._errors(f"look for {name}"), suppress(FileNotFoundError):
            return _stored_object(self._obstore.head(self._remote, name))
        return None

    def open_file(self, name: str) -> pa.NativeFile:
        with self._errors(f"read {name}"):
            return pa.PythonFile(_Reader(self, name, self._obstore.open_reader(self._remote, name)), mode="r")

    def download(self, name: str, path: Path) -> str:
        with self._errors(f"read {name}"), path.open("wb") as file:
            return self._hashed(name, file.write)

    def objects(self, folder: str, *, after: str | None = None) -> list[StoredObject]:
        with self._errors(f"list {folder}"):
            found = [
                _stored_object(meta)
                for page in self._obstore.list(self._remote, f"{folder}/" if folder else None, offset=after)
                for meta in page
            ]
        return sorted(found, key=lambda stored: stored.name)

    def sha256(self, name: str) -> str:
        with self._errors(f"read {name}"):
            return self._hashed(name, lambda _part: None)

    def delete(self, name: str) -> None:
        with self._errors(f"delete {name}"):
            self._obstore.delete(self._remote, [name, *(stored.name for stored in self.objects(name))])

    def _hashed(self, name: str, write: Callable[[Any], object]) -> str:
        """SHA-256 (hex) of an object, of which `write` gets all pieces."""
        content = hashlib.sha256()
        for part in self._obstore.get(self._remote, name).stream(min_chunk_size=_READ_BYTES):
            content.update(part)
            write(part)
        return content.hexdigest()

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


class LocalStore(ObjectStore):
    """A folder: read and listed through obstore as any other store, and through the file system where that does more.

    Args:
        url: a path or a `file://` URL. There need be no such folder until something is read.

    Raises:
        RegistryError: of all that reads: there is no such folder.
        MissingExtraError: obstore is not installed.
    """

    def __init__(self, url: str) -> None:
        self._obstore = require("obstore", "registry")
        self.root = Path(unquote(url.removeprefix("file://")) if "://" in url else url).absolute()
        self.url = self.root.as_uri()

    @property
    def exists(self) -> bool:
        return self.root.is_dir()

    @cached_property
    def _remote(self) -> Any:
        if not self.exists:
            raise RegistryError(
                f"{self.url}: there is no such folder; check the name, or begin a registry with "
                "`torchrec-cce maps publish`"
            )
        return require("obstore.store", "registry").LocalStore(self.root, automatic_cleanup=True)

    def path(self, name: str = "") -> Path:
        return self.root / name

    def create(self, name: str, content: bytes) -> bool:
        with self._errors(f"create {name}"):
            return _create_file(self.root / name, content)

    @contextmanager
    def writer(self, name: str) -> Iterator[Sink]:
        with self._errors(f"write {name}"):
            make_folder(self.root)
        with super().writer(name) as sink:
            yield sink

    def find(self, name: str) -> StoredObject | None:
        with self._errors(f"look for {name}"), suppress(FileNotFoundError):
            return self._stored(self.root / name)
        return None

    def open_file(self, name: str) -> pa.NativeFile:
        with self._errors(f"read {name}"):
            return pa.OSFile(str(self.root / name))

    def sha256(self, name: str) -> str:
        with self._errors(f"read {name}"):
            return sha256_of(self.root / name)

    def delete(self, name: str) -> None:
        path = self.root / name
        with self._errors(f"delete {name}"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def flush(self, name: str) -> None:
        path = self.root / name
        with self._errors(f"flush {name}"):
            for item in (*path.rglob("*"), path, *path.relative_to(self.root).parents):
                flush(self.root / item)

    def leftovers(self) -> list[StoredObject]:
        found = []
        # Unlike `rglob`, `walk` passes over a folder that its publisher or another `gc` deletes meanwhile.
        for folder, folders, files in os.walk(self.root):
            paths = [Path(folder, file) for file in files if "#" in file]
            if not folders and not files and Path(folder) != self.root:
                paths.append(Path(folder))
            for path in paths:
                with suppress(FileNotFoundError):  # its writer may be alive, and done with it
                    found.append(self._stored(path))
        return found

    def _stored(self, path: Path) -> StoredObject:
        """Raises FileNotFoundError."""
        stat = path.stat()
        modified = datetime.fromtimestamp(stat.st_mtime, timezone.utc)
        return StoredObject(name=path.relative_to(self.root).as_posix(), num_bytes=stat.st_size, modified=modified)


def _create_file(path: Path, content: bytes) -> bool:
    """On the disk before it has its name: no power cut leaves a named file that is empty."""
    make_folder(path.parent)
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


class _Reader:
    """obstore's reader as the file object that Arrow wants; its errors are ours."""

    closed = False

    def __init__(self, store: ObjectStore, name: str, reader: Any) -> None:
        self._store = store
        self._name = name
        self._reader = reader

    def read(self, size: int = -1) -> bytes:
        with self._store._errors(f"read {self._name}"):
            return bytes(self._reader.read(None if size < 0 else size))

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with self._store._errors(f"read {self._name}"):
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
