"""The files of a published version on this machine: verified, and for a remote registry copied first.

A file that was verified once is not read again until it changes: a *receipt* keeps its size, inode and times. Any write
to a file moves its change time, which no program can set back.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Literal

from filelock import FileLock

from torchrec_cce.errors import MapFileError
from torchrec_cce.files.atomic import atomic_path, write_json
from torchrec_cce.files.cache import default_cache
from torchrec_cce.maps.bundle import check_file
from torchrec_cce.maps.manifest import FileEntry, Manifest
from torchrec_cce.maps.storage import Storage

Verify = Literal["changed", "all"]
"""Which files `open` reads whole: those that have changed since they were verified on this machine, or all."""


class LocalCopies:
    """Versions of one registry on this machine, shared by all its processes.

    Args:
        cache: folder of copies and receipts; by default `TORCHREC_CCE_CACHE`, or the user's cache folder.
    """

    def __init__(self, storage: Storage, cache: Path | None = None) -> None:
        self._storage = storage
        self._cache = (cache or default_cache()) / hashlib.sha256(storage.url.encode()).hexdigest()[:16]

    def bring(self, folder: str, manifest: Manifest, *, verify: Verify = "changed") -> Path:
        """The local folder of a version, with all its files verified. Its processes wait for the first that copies.

        Raises:
            MapFileError: a file is missing, cut short or damaged.
            RegistryError: the store did not answer.
        """
        receipt_path = self._cache / "receipts" / f"{Path(folder).name}.json"
        if self._storage.local_root is not None:
            local = self._storage.local_root / folder
            self._verify(local, manifest.files(), receipt_path, verify)
            return local
        local = self._cache / folder
        local.mkdir(parents=True, exist_ok=True)
        with FileLock(self._cache / f"{Path(folder).name}.lock"):
            for entry in manifest.files():
                self._copy(folder, entry, local / entry.name)
            try:
                self._verify(local, manifest.files(), receipt_path, verify)
            except MapFileError:
                shutil.rmtree(local)  # the next to open it copies it anew
                raise
        return local

    def keep_only(self, folders: Iterable[str]) -> None:
        """Forget the copies of versions that the registry no longer has. Who has mapped one keeps it until done."""
        kept = {Path(folder).name for folder in folders}
        # Another process may know of a newer version than we do, and be copying it now.
        newest = max(map(_version, kept), default=0)
        patterns = ("versions/*", "receipts/*.json", "*.lock")
        for path in [path for pattern in patterns for path in self._cache.glob(pattern)]:
            name = path.name.split(".")[0]
            if name in kept or _version(name) > newest:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _copy(self, folder: str, entry: FileEntry, path: Path) -> None:
        if path.exists():
            return
        with atomic_path(path) as temporary:
            try:
                found = self._storage.download(f"{folder}/{entry.name}", temporary)
            except FileNotFoundError as error:
                raise MapFileError(
                    f"{self._storage.url}/{folder}/{entry.name}: no such object, but the manifest names it; roll back "
                    "or publish again"
                ) from error
            if found != entry.sha256:
                raise MapFileError(
                    f"{self._storage.url}/{folder}/{entry.name}: its SHA-256 is {found[:12]}, recorded is "
                    f"{entry.sha256[:12]}; the object is damaged, publish it again or roll back"
                )

    def _verify(self, folder: Path, entries: Iterable[FileEntry], receipt_path: Path, verify: Verify) -> None:
        receipt: dict[str, list[object]] = {}
        with suppress(OSError, ValueError):
            receipt = json.loads(receipt_path.read_bytes())
        fresh = {}
        for entry in entries:
            path = folder / entry.name
            known = receipt.get(entry.name) if verify == "changed" else None
            before = _stamp(path, entry)
            if known is None or known != before:
                check_file(path, entry)
            fresh[entry.name] = before
        if fresh != receipt:
            with suppress(OSError):  # a full cache disk only costs time
                write_json(receipt_path, fresh)


def _stamp(path: Path, entry: FileEntry) -> list[object] | None:
    """What changes whenever a file does, with the digest that is expected; None if there is no file."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return [entry.sha256, stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def _version(folder_name: str) -> int:
    return int(folder_name.split("-")[0])
