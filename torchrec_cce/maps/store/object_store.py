"""Objects in S3, GCS, Azure and whatever else obstore reaches. Here alone is obstore."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa

from torchrec_cce.errors import RegistryError
from torchrec_cce.extras import require
from torchrec_cce.maps.arrow_file import Sink
from torchrec_cce.maps.store.store import Store, StoredObject, in_one_line

_READ_BYTES = 4 << 20
_PART_BYTES = 8 << 20
_PARTS_AT_A_TIME = 2
"""A writer holds at most this many parts: memory, against throughput to a far store."""
_users: set[int] = set()
"""The process whose threads obstore has started, if there is one: those of a fork's parent are not in the fork."""


class ObjectStore(Store):
    """A prefix of a bucket. Arguments and errors: `open_store`."""

    def __init__(self, url: str, **options: Any) -> None:
        self._obstore = require("obstore", "registry")
        self.url = url
        with self._errors("set up"):  # so that a wrong URL is known at once
            self._store = require("obstore.store", "registry").from_url(_with_literal_key(url), **options)

    @property
    def _remote(self) -> Any:
        """What obstore's functions take as their store.

        Raises:
            RegistryError: this process was forked from one that has used it, and would wait for ever.
        """
        _users.add(os.getpid())
        if len(_users) > 1:
            raise RegistryError(
                f"{self.url}: this process was forked from one that has used an object store, whose threads it does "
                'not have; start processes by "spawn" or "forkserver", or use the store in the forks alone'
            )
        return self._store

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

    def _errors(self, action: str) -> AbstractContextManager[None]:
        return in_one_line(self.url, action, (self._obstore.exceptions.BaseError, OSError, ValueError))


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


def _with_literal_key(url: str) -> str:
    """`url` as obstore takes it, which decodes the part after the bucket: here that is the key, letter by letter."""
    scheme, mark, rest = url.partition("://")
    if scheme.lower() in ("http", "https"):  # of a server: a URL like any other
        return url
    bucket, slash, key = rest.partition("/")
    return f"{scheme}{mark}{bucket}{slash}{quote(key)}"
