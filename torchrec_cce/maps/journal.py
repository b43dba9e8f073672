"""The append-only log of a registry: which versions there are, and which one is current.

Record `n` is one small object, created only if absent, and holds the whole state after it. So the newest record is the
state, a step from one state to the next is one atomic creation, and of two who step from record `n` exactly one creates
record `n + 1`. Records are never deleted or rewritten: a number that was free once more could be taken by someone who
had slept.
"""

import os
import secrets
import socket
import time
from dataclasses import replace
from datetime import datetime, timezone
from typing import Annotated, Literal

from pydantic import AwareDatetime, ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from torchrec_cce.errors import MapFileError, PublishConflictError, RegistryError
from torchrec_cce.maps.manifest import Count, Positive, Sha256
from torchrec_cce.maps.sealed import parse, seal
from torchrec_cce.maps.store import Store

FORMAT: Literal[1] = 1
_LOG = "log"
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

    def state(self) -> RegistryState:
        """The newest record; the empty state if there is none.

        Raises:
            MapFileError: the record is damaged, or of a later format.
            RegistryError: the store did not answer.
        """
        listed = self._store.objects(_LOG, after=self._last_seen)
        names = [stored.name for stored in listed if stored.name.endswith(".json")]
        newest = names[-1] if names else self._last_seen
        if newest is None:
            return RegistryState()
        state = _parse(self._store.read(newest), f"{self._store.url}/{newest}")
        if _name(state.sequence) != newest:
            raise MapFileError(f"{self._store.url}/{newest}: holds record {state.sequence}; the log is damaged")
        self._last_seen = newest
        return state

    def records(self) -> list[RegistryState]:
        """All records, oldest first."""
        names = [stored.name for stored in self._store.objects(_LOG) if stored.name.endswith(".json")]
        return [_parse(self._store.read(name), f"{self._store.url}/{name}") for name in names]

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
            try:
                if self._store.create(name, record):
                    return after
            except RegistryError as error:
                failure = error
            # Not always somebody else's: a store may take a record, and its answer be lost.
            try:
                found = self._store.read(name)
            except FileNotFoundError:
                continue
            except RegistryError as error:
                failure = error
                continue
            if found == record:
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


def _name(sequence: int) -> str:
    return f"{_LOG}/{sequence:020d}.json"


def _parse(document: bytes, name: str) -> RegistryState:
    return parse(_ADAPTER, document, name, newest_format=FORMAT)
