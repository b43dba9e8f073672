"""Published versions of a model's maps and codebooks: immutable, verified, and one of them current."""

import errno
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from torchrec_cce.errors import ConfigError, JobError, MapFileError, PublishConflictError, RegistryError
from torchrec_cce.maps.bundle import read_tables
from torchrec_cce.maps.journal import Action, Journal, PublishedVersion, RegistryState
from torchrec_cce.maps.kept import note_kept
from torchrec_cce.maps.manifest import Manifest, Provenance
from torchrec_cce.maps.snapshot import Churn, MapHolder, TableSnapshot, churn
from torchrec_cce.maps.store import open_store
from torchrec_cce.maps.store.store import CLOCK, StoredObject
from torchrec_cce.maps.version_files import VERSIONS, Verify, VersionFiles

_log = logging.getLogger(__name__)
_ATTEMPTS = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class MapVersion:
    """An opened version: verified, on this machine, memory-mapped."""

    entry: PublishedVersion
    manifest: Manifest
    folder: Path
    tables: Mapping[str, TableSnapshot]

    @property
    def version(self) -> int:
        return self.entry.version

    @property
    def identity(self) -> str:
        """For messages: `version 7 (manifest 1a2b3c4d…)`."""
        return self.entry.identity

    def attach(self, module: MapHolder) -> None:
        """Give `module` the maps of this version together with the codebooks and helpers they point at.

        The maps stay memory-mapped: all processes of a machine share one copy.

        Raises:
            MapMismatchError: the module has other CCE tables, or tables of other sizes. It has not been changed.
        """
        module.restore(self.tables)


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What `gc` removed."""

    versions: tuple[int, ...]
    debris: tuple[str, ...]
    """Folders and files of publishers that died."""
    num_bytes: int


class Registry:
    """Versions in a folder or an object store. Any number of processes and machines may use it at once.

    Publishing writes a version's files, then its manifest, then one record of the journal, which makes it current: a
    publisher that dies on the way leaves what was current as it was, and some files for `gc`.

    Args:
        url: a local path, `file://`, `s3://bucket/prefix`, `gs://…`, `az://…`.
        cache: where this machine keeps copies of remote versions and notes of what it verified; by default
            `TORCHREC_CCE_CACHE`, or the user's cache folder.
        options: for the object store, see `torchrec_cce.maps.store.open_store`.

    Example:
        >>> registry = Registry("s3://models/ctr/maps")                 # doctest: +SKIP
        >>> registry.publish(collection.snapshot())                     # doctest: +SKIP
        >>> registry.open().attach(another_collection)                  # doctest: +SKIP
    """

    def __init__(self, url: str | Path, *, cache: Path | None = None, **options: Any) -> None:
        self._store = open_store(url, **options)
        self.options = options
        """As given: with them another process opens the same registry."""
        self._journal = Journal(self._store)
        self._files = VersionFiles(self._store, self._journal, cache)

    @property
    def url(self) -> str:
        return self._store.url

    def state(self) -> RegistryState:
        """The versions there are, which is current, which are pinned."""
        return self._journal.state()

    def history(self) -> list[RegistryState]:
        """The state after every step since the registry began, oldest first."""
        return self._journal.records()

    def publish(
        self,
        tables: Mapping[str, TableSnapshot],
        *,
        parent: int | None = None,
        checkpoint: str | None = None,
        config_digest: str | None = None,
        confirm: Callable[[], object] = lambda: None,
    ) -> PublishedVersion:
        """Write a version and make it current.

        Args:
            tables: of all CCE tables of the model, with their weights.
            parent: the version that they were made from. It must still be current: who clustered from an older one
                would undo what was published since. None is whatever is current when the call begins.
            checkpoint, config_digest: provenance, for the manifest.
            confirm: called when all is written, right before it becomes current. What it raises ends the call, and
                nothing has changed.

        Raises:
            PublishConflictError: another publisher was first, or `parent` is not current. Nothing has changed.
            RegistryError: the store did not answer. What was current still is, unless the message says otherwise.
            ConfigError: no tables.
        """
        if not tables:
            raise ConfigError("there are no tables to publish; the model has no CCE table")
        before = self.state() if self._store.exists else RegistryState()
        if parent is not None and parent != before.current:
            current = "nothing" if before.current is None else before.find(None).identity
            raise PublishConflictError(
                f"{self.url}: the tables were made from version {parent}, but current is {current}; open it and "
                "start from there, or roll back first"
            )
        entry = self._files.write(
            tables,
            number=before.next_version,
            parent=before.current,
            churn=self._churn_since(before, tables),
            provenance=Provenance.of_this_code(checkpoint=checkpoint, config_digest=config_digest),
        )
        try:
            confirm()
            self._journal.append(
                before,
                replace(
                    before,
                    action="publish",
                    subject=entry.version,
                    current=entry.version,
                    next_version=entry.version + 1,
                    versions=(*before.versions, entry),
                ),
            )
        except (PublishConflictError, JobError):
            self._files.discard(entry.folder)
            raise
        if not self._is_whole(entry):
            self._take_back(entry)
            raise RegistryError(
                f"{self.url}: files of {entry.identity} have gone while it was published, by hand or by a `gc` of an "
                "older release; it was taken back. Publish again"
            )
        self._store.put_room_aside()
        note_kept(tables)
        return entry

    def open(self, version: int | None = None, *, verify: Verify = "changed") -> MapVersion:
        """Open a version: fetch it if it is remote, verify it, map it into memory.

        Args:
            version: None is the current one.
            verify: `"changed"` reads the files that have not been verified on this machine, or changed since; `"all"`
                reads all.

        Raises:
            RegistryError: nothing was published, there is no such version, or the store did not answer.
            MapFileError: the version is damaged; the message names the file.
        """
        state = self.state()
        entry = self._find(state, version)
        manifest = self._files.manifest(entry)
        try:
            folder = self._files.bring(entry.folder, manifest, verify=verify)
            tables = read_tables(folder, manifest)
        except MapFileError as error:
            if self._files.was_collected(entry):
                raise RegistryError(
                    f"{self.url}: {entry.identity} was collected while it was opened; open the current one"
                ) from error
            raise
        self._files.keep_only(published.folder for published in state.versions)
        return MapVersion(entry=entry, manifest=manifest, folder=folder, tables=tables)

    def manifest(self, version: int | None = None) -> Manifest:
        """The manifest of a version, of the current one if None. Raises as `open`."""
        return self._files.manifest(self._find(self.state(), version))

    def verify(self, version: int | None = None) -> list[MapFileError]:
        """Read every file of a version, or of all versions, from the store, and return what is damaged.

        What is collected meanwhile is left out.

        Raises:
            RegistryError: there is no such version, or the store did not answer.
        """
        state = self.state()
        entries = state.versions if version is None else (self._find(state, version),)
        return [error for entry in entries for error in self._files.damage(entry)]

    def diff(self, old: int, new: int) -> dict[str, Churn | None]:
        """Table → how much its pointers changed; None for a table that only one of the two has, or of other columns."""
        before, after = self.open(old).tables, self.open(new).tables
        return {name: churn(before.get(name), after.get(name)) for name in dict.fromkeys([*before, *after])}

    def rollback(self, version: int) -> PublishedVersion:
        """Make an earlier version current again. The versions since then stay, and can be rolled forward to.

        Raises:
            RegistryError: there is no such version, or it is current already.
            PublishConflictError: somebody else changed the registry at the same time.
            MapFileError: the version is damaged.
        """
        before = self.state()
        entry = self._find(before, version)
        if before.current == version:
            raise RegistryError(f"{self.url}: {entry.identity} is current already")
        damage = self.verify(version)
        if damage:
            raise damage[0]
        self._journal.append(before, replace(before, action="rollback", subject=version, current=version))
        return entry

    def pin(self, version: int, *, pinned: bool = True) -> PublishedVersion:
        """Keep a version from being collected, or (`pinned=False`) no longer. Raises as `rollback`."""
        before = self.state()
        entry = replace(self._find(before, version), pinned=pinned)
        versions = tuple(entry if other.version == version else other for other in before.versions)
        action: Action = "pin" if pinned else "unpin"
        self._journal.append(before, replace(before, action=action, subject=version, versions=versions))
        return entry

    def gc(
        self,
        *,
        keep_last: int,
        debris_age: timedelta = timedelta(days=1),
        keep_records: int = 1000,
        dry_run: bool = False,
    ) -> Collected:
        """Delete debris, old records, and versions that are neither current nor pinned nor among the last `keep_last`.

        Debris are the files of publishers that died, once the newest of them is `debris_age` old by the store's clock:
        longer than a publisher can pause between two files. If one lives all the same, it gets a PublishConflictError.

        Args:
            keep_records: how many records the log keeps, which `history` has; the newest is all that the others need.

        Raises:
            ConfigError: `keep_last < 1` or `keep_records < 1`.
            PublishConflictError: somebody else changed the registry at the same time; nothing has been deleted.
            RegistryError: the store did not answer.
        """
        for name, least in (("keep_last", keep_last), ("keep_records", keep_records)):
            if least < 1:
                raise ConfigError(f"{name}={least} is not at least 1")
        # In this order: what is listed here and not in the state that is read after is not a version yet.
        found = [*self._store.objects(VERSIONS), *self._store.objects(CLOCK), *self._store.leftovers()]
        before = self.state()
        last = {entry.version for entry in before.versions[-keep_last:]} | {before.current}
        kept = tuple(entry for entry in before.versions if entry.pinned or entry.version in last)
        dropped = [entry for entry in before.versions if entry not in kept]
        debris = _debris(found, {entry.folder for entry in before.versions}, self._now(found) - debris_age)
        if not dry_run:
            if dropped or debris:
                # Also for debris alone: whoever has written some of it and lives has read an earlier state than this
                # record, and can no longer publish from there.
                self._append_with_room(
                    before, replace(before, action="collect", subject=None, versions=kept), keep_records
                )
            for name in (*(entry.folder for entry in dropped), *debris):
                self._store.delete(name)
            self._journal.cut(keep=keep_records)
            self._store.put_room_aside()
        return Collected(
            versions=tuple(entry.version for entry in dropped),
            debris=tuple(debris),
            num_bytes=sum(entry.num_bytes for entry in dropped) + sum(debris.values()),
        )

    def watch(self, current: int | None = None, *, interval_s: float = 30.0) -> Iterator[MapVersion]:
        """Open each version that becomes current, for ever; also an older one after a rollback.

        A store that does not answer is asked again, with a warning in the log.

        Args:
            current: the version that the caller has; the first one yielded differs from it.
            interval_s: seconds between two looks.

        Raises:
            MapFileError: the version that became current is damaged.
        """
        while True:
            try:
                now = self.state().current
                opened = None if now is None or now == current else self.open(now)
            except RegistryError as error:
                _log.warning("%s; looking again in %g s", error, interval_s)
                opened = None
            if opened is not None:
                current = opened.version
                yield opened
            time.sleep(interval_s)

    def _now(self, found: Sequence[StoredObject]) -> datetime:
        """The time by the store's clock; where it takes no object, no later than that."""
        try:
            return self._store.now()
        except RegistryError:
            return max((item.modified for item in found), default=datetime.min.replace(tzinfo=timezone.utc))

    def _append_with_room(self, before: RegistryState, after: RegistryState, keep_records: int) -> None:
        """Take a step that frees room, also where there is none for its record."""
        try:
            self._journal.append(before, after)
        except RegistryError as error:
            if not _is_full(error):
                raise
            self._store.give_room()
            self._journal.cut(keep=keep_records)
            self._journal.append(before, after)

    def _is_whole(self, entry: PublishedVersion) -> bool:
        """Whether the files of a version are there, as far as the store answers."""
        try:
            return self._files.are_whole(entry)
        except RegistryError as error:
            _log.warning("%s was published, but cannot be looked at: %s", entry.identity, error)
            return True

    def _take_back(self, entry: PublishedVersion) -> None:
        """Undo the publication of a version that nobody can open."""
        for _ in range(_ATTEMPTS):
            state = self.state()
            others = tuple(other for other in state.versions if other.version != entry.version)
            with suppress(PublishConflictError):
                if state.current == entry.version and others:
                    back = next((other for other in others if other.version == entry.parent), others[-1]).version
                    state = self._journal.append(state, replace(state, action="rollback", subject=back, current=back))
                current = state.current if others else None
                self._journal.append(
                    state, replace(state, action="collect", subject=None, versions=others, current=current)
                )
                self._files.discard(entry.folder)
                return

    def _find(self, state: RegistryState, version: int | None) -> PublishedVersion:
        try:
            return state.find(version)
        except RegistryError as error:
            raise RegistryError(f"{self.url}: {error}") from None

    def _churn_since(self, state: RegistryState, tables: Mapping[str, TableSnapshot]) -> dict[str, float]:
        """Table → share of changed pointers against the current version, as far as they can be compared."""
        if state.current is None:
            return {}
        try:
            before = self.open(state.current).tables
        except (MapFileError, RegistryError) as error:
            _log.warning("churn is not recorded: %s", error)  # a damaged version must not keep its successor away
            return {}
        compared = {name: churn(before.get(name), table) for name, table in tables.items()}
        return {name: change.share_changed for name, change in compared.items() if change is not None}


def _is_full(error: BaseException | None) -> bool:
    """Whether an error comes from a disk without room."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__
    return False


def _debris(found: Iterable[StoredObject], versions: set[str], long_ago: datetime) -> dict[str, int]:
    """Folders and files that belong to no version and were not touched after `long_ago` → their bytes."""
    newest: dict[str, datetime] = {}
    sizes: dict[str, int] = {}
    for item in found:
        name = "/".join(item.name.split("/")[:2])  # `versions/FOLDER`, or an unfinished file elsewhere
        newest[name] = max(item.modified, newest.get(name, item.modified))
        sizes[name] = sizes.get(name, 0) + item.num_bytes
    return {name: sizes[name] for name, modified in newest.items() if name not in versions and modified <= long_ago}
