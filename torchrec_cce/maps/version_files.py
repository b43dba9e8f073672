"""The files of a published version: written once, checked in the store, and brought to this machine to be mapped.

A file that was verified once is not read again until it changes: a *receipt* keeps its size, inode and times. The
system moves a file's change time with every write, and with the first one through a mapping after the file was flushed,
as it is before it is read. Receipts are believed where nobody else can write them. They do not show what somebody does
who can set the clock or write to the disk itself, and writes to a mapping on file systems without such times (tmpfs).
"""

import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from filelock import FileLock

from torchrec_cce.errors import MapFileError, RegistryError
from torchrec_cce.files.atomic import atomic_path, flush, write_json
from torchrec_cce.files.cache import default_cache
from torchrec_cce.maps.bundle import check_content, check_file, read_tables, write_bundle
from torchrec_cce.maps.journal import Journal, PublishedVersion
from torchrec_cce.maps.manifest import MANIFEST, FileEntry, Manifest, Provenance
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.maps.store import Store

VERSIONS = "versions"
"""The folder of all versions' folders."""
Verify = Literal["changed", "all"]
"""Which files `open` reads whole: those that have changed since they were verified on this machine, or all."""

_log = logging.getLogger(__name__)
_RECEIPTS = 2
"""The format of receipts. Those of format 1 do not say that the codes of maps were looked at."""
_TICK_NS, _TICKS = 20_000_000, 2
"""File systems tell times by the ticks of the kernel, of up to 10 ms."""
_SAID: set[Path] = set()
"""Cache folders that were warned of."""


class VersionFiles:
    """The files of one registry's versions, in its store and on this machine; there all processes share them.

    Args:
        cache: folder of copies and receipts; by default `TORCHREC_CCE_CACHE`, or the user's cache folder.
    """

    def __init__(self, store: Store, journal: Journal, cache: Path | None = None) -> None:
        self._store = store
        self._journal = journal
        self._cache = (cache or default_cache()) / hashlib.sha256(store.url.encode()).hexdigest()[:16]

    def write(
        self,
        tables: Mapping[str, TableSnapshot],
        *,
        number: int,
        parent: int | None,
        churn: Mapping[str, float],
        provenance: Provenance,
    ) -> PublishedVersion:
        """Write all files of a new version to a folder of its own, and return the entry that is to publish it.

        Raises:
            RegistryError: the store did not answer, or files have gone again. Nothing stays behind, if that can be.
        """
        folder = f"{VERSIONS}/{number:08d}-{secrets.token_hex(4)}"
        try:
            manifest = write_bundle(
                lambda name: self._store.writer(f"{folder}/{name}"),
                tables,
                version=number,
                parent=parent,
                churn=churn,
                provenance=provenance,
            )
            self._store.flush(folder)
            document = manifest.to_json()
            entry = PublishedVersion(
                version=number,
                folder=folder,
                manifest_sha256=hashlib.sha256(document).hexdigest(),
                parent=parent,
                created=manifest.created,
                num_bytes=sum(file.num_bytes for file in manifest.files()) + len(document),
            )
            if not self.are_whole(entry):
                raise RegistryError(
                    f"{self._store.url}/{folder}: files are missing that were just written; a gc with too small a "
                    "debris_age took them. Publish again"
                )
        except BaseException:
            self.discard(folder)
            raise
        return entry

    def are_whole(self, entry: PublishedVersion) -> bool:
        """Whether all files of a version that was just written are there, as their sizes tell."""
        return sum(stored.num_bytes for stored in self._store.objects(entry.folder)) == entry.num_bytes

    def discard(self, folder: str) -> None:
        """Delete the folder of a version that was not published, if the store answers; if not, `gc` does later."""
        with suppress(RegistryError):
            self._store.delete(folder)

    def manifest(self, entry: PublishedVersion) -> Manifest:
        """The manifest of a version.

        Raises:
            RegistryError: the version was collected since its entry was read, or the store did not answer.
            MapFileError: the manifest is missing or damaged.
        """
        name = f"{entry.folder}/{MANIFEST}"
        try:
            document = self._store.read(name)
        except FileNotFoundError as error:
            if self.was_collected(entry):
                raise RegistryError(
                    f"{self._store.url}/{name}: no such object; the version was collected. Open the current one"
                ) from error
            raise MapFileError(
                f"{self._store.url}/{name}: no such object, but the journal names it; roll back or publish again"
            ) from error
        found = hashlib.sha256(document).hexdigest()
        if found != entry.manifest_sha256:
            raise MapFileError(
                f"{self._store.url}/{name}: its SHA-256 is {found[:12]}, recorded is {entry.manifest_sha256[:12]}; the "
                "manifest is damaged, roll back or publish again"
            )
        return Manifest.from_json(document, f"{self._store.url}/{name}")

    def damage(self, entry: PublishedVersion) -> list[MapFileError]:
        """What is damaged in a version, all of it read from the store; nothing if it is collected meanwhile.

        Maps are digested anew, and their codes looked at. From an object store, one table at a time is copied for that
        to the cache folder.
        """
        try:
            manifest = self.manifest(entry)
        except MapFileError as error:
            return [error]
        except RegistryError:
            if self.was_collected(entry):
                return []
            raise
        damage = []
        for name, table in manifest.tables.items():
            one_table = replace(manifest, tables={name: table})
            in_place = self._store.path(entry.folder)
            with nullcontext(in_place) if in_place is not None else self._scratch() as folder:
                looked_at = [self._fetched(entry, file, folder) for file in table.files()]
                damaged = [found for found in looked_at if found is not None]
                if not damaged:
                    try:
                        check_content(read_tables(folder, one_table), one_table, f"{self._store.url}/{entry.folder}")
                    except MapFileError as error:
                        damaged.append(error)
            damage += damaged
        return [] if damage and self.was_collected(entry) else damage

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        with TemporaryDirectory(dir=self._own_cache(), prefix="verify.") as folder:
            yield Path(folder)

    def _fetched(self, entry: PublishedVersion, file: FileEntry, folder: Path) -> MapFileError | None:
        """What is wrong with a file, which is then in `folder`; None if nothing is."""
        name = f"{entry.folder}/{file.name}"
        try:
            if self._store.path(name) is not None:
                found = self._store.sha256(name)
            else:
                found = self._store.download(name, folder / file.name)
        except FileNotFoundError:
            found = "missing"
        if found == file.sha256:
            return None
        return MapFileError(f"{self._store.url}/{name}: SHA-256 {found[:12]}, recorded is {file.sha256[:12]}")

    def was_collected(self, entry: PublishedVersion) -> bool:
        """Whether `gc` took a version since its entry was read: then files that are gone are no damage."""
        return entry.version not in {published.version for published in self._journal.state().versions}

    def bring(self, folder: str, manifest: Manifest, *, verify: Verify = "changed") -> Path:
        """The local folder of a version, with all its files verified. Its processes wait for the first that copies.

        Raises:
            MapFileError: a file is missing, cut short or damaged.
            RegistryError: the store did not answer.
        """
        receipt_path = self._cache / "receipts" / f"{Path(folder).name}.json"
        in_place = self._store.path(folder)
        if in_place is not None:
            self._verify(in_place, manifest, receipt_path, verify)
            return in_place
        local = self._own_cache() / folder
        local.mkdir(parents=True, exist_ok=True)
        with FileLock(self._cache / f"{Path(folder).name}.lock"):
            for entry in manifest.files():
                self._copy(folder, entry, local / entry.name)
            try:
                self._verify(local, manifest, receipt_path, verify)
            except MapFileError:
                shutil.rmtree(local)  # the next to open it copies it anew
                raise
        return local

    def keep_only(self, folders: Iterable[str]) -> None:
        """Forget the copies of versions that the registry no longer has. Who has mapped one keeps it until done."""
        kept = {Path(folder).name for folder in folders}
        # Another process may know of a newer version than we do, and be copying it now.
        newest = max(map(_version, kept), default=0)
        patterns = (f"{VERSIONS}/*", "receipts/*.json", "*.lock")
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
                found = self._store.download(f"{folder}/{entry.name}", temporary)
            except FileNotFoundError as error:
                raise MapFileError(
                    f"{self._store.url}/{folder}/{entry.name}: no such object, but the manifest names it; roll back "
                    "or publish again"
                ) from error
            if found != entry.sha256:
                raise MapFileError(
                    f"{self._store.url}/{folder}/{entry.name}: its SHA-256 is {found[:12]}, recorded is "
                    f"{entry.sha256[:12]}; the object is damaged, publish it again or roll back"
                )

    def _verify(self, folder: Path, manifest: Manifest, receipt_path: Path, verify: Verify) -> None:
        receipt: dict[str, object] = {}
        with suppress(OSError, ValueError):
            if _is_ours(self._own_cache()):
                receipt = json.loads(receipt_path.read_bytes())
        if not isinstance(receipt, dict) or receipt.get("format") != _RECEIPTS:
            receipt = {}
        fresh: dict[str, object] = {"format": _RECEIPTS}
        for entry in manifest.files():
            path = folder / entry.name
            known = receipt.get(entry.name) if verify == "changed" else None
            before = _stamp(path, entry)
            if known is None or known != before:
                before = _settled_stamp(path, entry)
                check_file(path, entry)
            fresh[entry.name] = before
        if fresh != receipt:
            check_content(read_tables(folder, manifest), None, str(folder))
            with suppress(OSError):  # a full cache disk only costs time
                write_json(receipt_path, fresh)

    def _own_cache(self) -> Path:
        """The folder of copies and receipts, which nobody else can write."""
        with suppress(OSError):
            self._cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._cache.stat().st_uid == os.getuid():
                self._cache.chmod(0o700)
        if self._cache.exists() and not _is_ours(self._cache) and self._cache not in _SAID:
            _SAID.add(self._cache)
            _log.warning(
                "%s: others can write there, so that every file is read whole each time; choose another folder by "
                "TORCHREC_CCE_CACHE",
                self._cache,
            )
        return self._cache


def _is_ours(folder: Path) -> bool:
    """Whether nobody but this user (and root) can write to a folder."""
    found = folder.stat()
    return found.st_uid == os.getuid() and not found.st_mode & 0o022


def _settled_stamp(path: Path, entry: FileEntry) -> list[object] | None:
    """The stamp of a file whose next change will show in it, whoever has written to it so far and still maps it."""
    with suppress(OSError):  # on a file system that is only read
        if path.is_file():
            flush(path)
    for _ in range(_TICKS):
        with suppress(FileNotFoundError):
            if 0 <= time.time_ns() - path.stat().st_ctime_ns < _TICK_NS:  # two changes may bear one time
                time.sleep(_TICK_NS / 1e9)
    return _stamp(path, entry)


def _stamp(path: Path, entry: FileEntry) -> list[object] | None:
    """What changes whenever a file does, with the digest that is expected; None if there is no file."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return [entry.sha256, stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def _version(folder_name: str) -> int:
    return int(folder_name.split("-")[0])
