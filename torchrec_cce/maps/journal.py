"""The append-only log of a registry: which versions there are, and which one is current.

Record `n` is one small object, created only if absent, and holds the whole state after it. So the newest record is the
state, a step from one state to the next is one atomic creation, and of two who step from record `n` exactly one creates
record `n + 1`. Records are never rewritten. `cut` deletes old ones, the oldest first, so that what is left follows one
upon another: by that, someone who had slept and takes a number that is free once more finds out that it is behind.
"""

import logging
import os
import re
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from typing import Annotated, Literal

from pydantic import AwareDatetime, ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from torchrec_cce.errors import MapFileError, PublishConflictError, RegistryError
from torchrec_cce.maps.manifest import Count, Positive, Sha256
from torchrec_cce.maps.sealed import parse, seal
from torchrec_cce.maps.store import Store

_log = logging.getLogger(__name__)

FORMAT: Literal[1] = 1
_LOG = "log"
_RECORD = re.compile(rf"{_LOG}/[0-9]{{20}}\.json")
_ATTEMPTS = 5
_CONFIG = ConfigDict(extra="forbid")

Action = Literal["publish", "rollback", "pin", "unpin", "collect"]


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class PublishedVersion:
    """A version that can be opened."""

    version: Positive
    folder: Annotated[str, Field(pattern=r"^versions/[0-9]{8,}-[0-9a-f]{8}$")]
    manifest_sha256: Sha256
    """Of the manifest, which has the SHA-256 of every file."""
    parent: Positive | None
    created: AwareDatetime
    num_bytes: Count
    """Of all its files."""
    pinned: bool = False

    @property
    def identity(self) -> str:
        """For messages: `version 7 (manifest 1a2b3c4d…)`."""
        return f"version {self.version} (manifest {self.manifest_sha256[:12]})"


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class RegistryState:
    """One record: the registry after `sequence` steps."""

    format: Literal[1] = FORMAT
    sequence: Count = 0
    action: Action | None = None
    """The step that led here; None before the first."""
    subject: Positive | None = None
    """The version that was published, rolled back to, pinned or unpinned."""
    time: AwareDatetime | None = None
    author: str = ""
    """Host and process of who took the step, and a token that tells two of one process apart."""
    current: Positive | None = None
    next_version: Positive = 1
    """No number is used twice, not even that of a version that was collected."""
    versions: tuple[PublishedVersion, ...] = ()
    """Oldest first."""

    def find(self, version: int | None) -> PublishedVersion:
        """The entry of a version, of the current one if None.

        Raises:
            RegistryError: nothing was published yet, or there is no such version; the message lists those there are.
        """
        wanted = self.current if version is None else version
        for entry in self.versions:
            if entry.version == wanted:
                return entry
        if not self.versions:
            raise RegistryError("nothing has been published yet")
        there = ", ".join(str(entry.version) for entry in self.versions)
        raise RegistryError(f"there is no version {wanted}; there are {there}")


_ADAPTER = TypeAdapter(RegistryState)


class Journal:
    """The log of one registry."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._last_seen: str | None = None
        self._strays: set[str] = set()
        """What was said of to be no record."""

    def state(self) -> RegistryState:
        """The newest record; the empty state if there is none.

        Raises:
            MapFileError: the record is damaged, or of a later format.
            RegistryError: the store did not answer.
        """
        names = self._names(after=self._last_seen)
        newest = names[-1] if names else self._last_seen
        if newest is None:
            return RegistryState()
        try:
            state = _parse(self._store.read(newest), f"{self._store.url}/{newest}")
        except FileNotFoundError as error:
            raise MapFileError(f"{self._store.url}/{newest}: the newest record has gone; restore it") from error
        if _name(state.sequence) != newest:
            raise MapFileError(f"{self._store.url}/{newest}: holds record {state.sequence}; the log is damaged")
        self._last_seen = newest
        return state

    def records(self) -> list[RegistryState]:
        """All records that there are, oldest first."""
        records = []
        for name in self._names():
            with suppress(FileNotFoundError):  # cut off meanwhile
                records.append(_parse(self._store.read(name), f"{self._store.url}/{name}"))
        return records

    def cut(self, *, keep: int) -> None:
        """Delete all records but the last `keep`, at least one. Raises RegistryError: the store did not answer."""
        for name in self._names()[: -max(1, keep)]:
            self._store.delete(name)

    def append(self, before: RegistryState, after: RegistryState) -> RegistryState:
        """Step from `before` to `after`, and return it as it was recorded.

        Raises:
            PublishConflictError: somebody else has stepped from `before`.
            RegistryError: the store did not answer, and whether the step was taken is not known.
        """
        after = replace(
            after,
            sequence=before.sequence + 1,
            time=datetime.now(timezone.utc),
            author=f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}",
        )
        name = _name(after.sequence)
        record = seal(_ADAPTER.dump_python(after, mode="json"))
        failure: RegistryError | None = None
        for attempt in range(_ATTEMPTS):
            time.sleep(attempt * 0.2)
            created = False
            try:
                created = self._store.create(name, record)
            except RegistryError as error:
                failure = error
            if created:
                self._check_follows(before, after)
                return after
            # Not always somebody else's: a store may take a record, and its answer be lost.
            try:
                found = self._store.read(name)
            except FileNotFoundError:
                continue
            except RegistryError as error:
                failure = error
                continue
            if found == record:
                self._check_follows(before, after)
                return after
            winner = _parse(found, f"{self._store.url}/{name}")
            current = "nothing" if winner.current is None else winner.find(None).identity
            raise PublishConflictError(
                f"{self._store.url}: {winner.author} came first with a {winner.action} of version {winner.subject}; "
                f"current is now {current}. Open it and start from there"
            )
        raise RegistryError(
            f"{self._store.url}: record {after.sequence} may or may not have been written after {_ATTEMPTS} tries "
            f"({failure}); list the registry before trying again"
        ) from failure

    def _check_follows(self, before: RegistryState, after: RegistryState) -> None:
        """Of a record that was just created: raise PublishConflictError if its number was free because it was cut off.

        Then there are later records, but not the one before it, and nobody has gone on from it.
        """
        name = _name(after.sequence)
        later = self._names(after=name)
        if not later or (before.sequence and self._store.find(_name(before.sequence)) is not None):
            return
        entries = self.state().versions
        if after.action == "publish" and after.versions[-1].folder in {entry.folder for entry in entries}:
            return
        self._store.delete(name)
        raise PublishConflictError(
            f"{self._store.url}: {len(later)} steps and more were taken since this {after.action} began, and the log "
            "was cut back. Open what is current and start from there"
        )

    def _names(self, *, after: str | None = None) -> list[str]:
        """Of records, oldest first; what else lies there is said once and left alone."""
        names = []
        for stored in self._store.objects(_LOG, after=after):
            if _RECORD.fullmatch(stored.name):
                names.append(stored.name)
            elif stored.name not in self._strays:
                self._strays.add(stored.name)
                _log.warning("%s: %r is no record of the log, and is passed over", self._store.url, stored.name)
        return names


def _name(sequence: int) -> str:
    return f"{_LOG}/{sequence:020d}.json"


def _parse(document: bytes, name: str) -> RegistryState:
    return parse(_ADAPTER, document, name, newest_format=FORMAT)
