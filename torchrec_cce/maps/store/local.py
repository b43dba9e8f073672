"""Objects as files in a folder of this machine."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from torchrec_cce.errors import RegistryError
from torchrec_cce.extras import require
from torchrec_cce.files.atomic import flush
from torchrec_cce.maps.arrow_file import Sink
from torchrec_cce.maps.sealed import sha256_of
from torchrec_cce.maps.store.object_store import ObjectStore
from torchrec_cce.maps.store.store import StoredObject


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
            self.root.mkdir(parents=True, exist_ok=True)
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
