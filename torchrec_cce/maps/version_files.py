"""The files of a published version: written once, checked in the store, and brought to this machine to be mapped.

A file that was verified once is not read again until it changes: a *receipt* keeps its size, inode and times. Any write
to a file moves its change time, which no program can set back.
"""

import hashlib
import json
import secrets
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

from filelock import FileLock

from torchrec_cce.errors import MapFileError, RegistryError
from torchrec_cce.files.atomic import atomic_path, write_json
from torchrec_cce.files.cache import default_cache
from torchrec_cce.maps.bundle import check_file, write_bundle
from torchrec_cce.maps.journal import Journal, PublishedVersion
from torchrec_cce.maps.manifest import MANIFEST, FileEntry, Manifest, Provenance
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.maps.store import Store

VERSIONS = "versions"
"""The folder of all versions' folders."""
Verify = Literal["changed", "all"]
"""Which files `open` reads whole: those that have changed since they were verified on this machine, or all."""


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
            there = {stored.name for stored in self._store.objects(folder)}
            if len(there) != len(manifest.files()) + 1:
                raise RegistryError(
                    f"{self._store.url}/{folder}: files are missing that were just written; a gc with too small a "
                    "debris_age took them. Publish again"
                )
        except BaseException:
            self.discard(folder)
            raise
        return entry

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
        """What is damaged in a version, all of it read from the store; nothing if it is collected meanwhile."""
        try:
            manifest = self.manifest(entry)
        except MapFileError as error:
            return [error]
        except RegistryError:
            if self.was_collected(entry):
                return []
            raise
        damage = []
        for file in manifest.files():
            name = f"{entry.folder}/{file.name}"
            try:
                found = self._store.sha256(name)
            except FileNotFoundError:
                found = "missing"
            if found != file.sha256:
                damage.append(
                    MapFileError(f"{self._store.url}/{name}: SHA-256 {found[:12]}, recorded is {file.sha256[:12]}")
                )
        return [] if damage and self.was_collected(entry) else damage

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
            self._verify(in_place, manifest.files(), receipt_path, verify)
            return in_place
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
