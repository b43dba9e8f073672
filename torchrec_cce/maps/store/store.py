"""The contract of a store: a folder of named objects, each of which appears complete or not at all."""

import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pyarrow as pa

from torchrec_cce.errors import CCEError, RegistryError
from torchrec_cce.maps.arrow_file import Sink

CLOCK = "clock"
"""A folder of objects that were written to ask for the time. Each is deleted at once, unless its writer dies."""


@dataclass(frozen=True, kw_only=True)
class StoredObject:
    name: str
    num_bytes: int
    modified: datetime
    etag: str | None = None
    """What the store calls this content, and no other; None where it has no name for it."""


class Store(ABC):
    """A folder of objects. Every write is of a whole object, and readers see all of it or none.

    A name is a path relative to the folder, with `/` between its parts. What is asked for and is not there is a
    FileNotFoundError; whatever else goes wrong in the back end is a RegistryError of one line that begins with `url`.
    A new back end passes `torchrec_cce.testing.store.StoreTests`.
    """

    url: str
    """Of the folder; another process opens the same store with it."""

    @property
    def exists(self) -> bool:
        """Whether there is a folder to read from. It is made when the first object is written."""
        return True

    @abstractmethod
    def read(self, name: str) -> bytes:
        """All of a small object.

        Raises:
            FileNotFoundError: there is no such object.
            RegistryError: there is no such folder, or the store did not answer.
        """

    @abstractmethod
    def create(self, name: str, content: bytes) -> bool:
        """Write a small object durably, unless there is one of that name. Returns whether it was written.

        Of any number of writers that create the same name at once, exactly one is told that it has written.

        Raises:
            RegistryError: the store did not answer; the object may or may not be there.
        """

    @abstractmethod
    def writer(self, name: str) -> AbstractContextManager[Sink]:
        """Write an object of any size, front to back, in bounded memory; it takes the place of an earlier one.

        The object appears when the context ends well. When it ends with an exception, no object appears.
        """

    @abstractmethod
    def find(self, name: str) -> StoredObject | None:
        """An object, None if there is none of that name."""

    @abstractmethod
    def open_file(self, name: str) -> pa.NativeFile:
        """An object as a file to read at any place; only what is read is fetched. Raises as `read`."""

    @abstractmethod
    def download(self, name: str, path: Path) -> str:
        """Copy an object to a local file in bounded memory. Returns its SHA-256 (hex). Raises as `read`."""

    @abstractmethod
    def objects(self, folder: str, *, after: str | None = None) -> list[StoredObject]:
        """All objects in `folder` ("" is the root) and below, in the order of their names; those after `after` only."""

    @abstractmethod
    def sha256(self, name: str) -> str:
        """SHA-256 (hex) of an object, read in bounded memory. Raises as `read`."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete an object, or a folder with whatever is in it. Nothing happens if there is neither."""

    def path(self, name: str = "") -> Path | None:  # noqa: ARG002
        """Where the object or folder `name` lies, or would lie, on a disk of this machine: there it can be mapped into
        memory and locked. None if the store keeps its objects elsewhere."""
        return None

    def flush(self, name: str) -> None:  # noqa: B027  most stores have nothing to do
        """Force an object, or all objects in a folder, to the disk, unless a write returns only after that anyway."""

    def now(self) -> datetime:
        """The time by the clock that `StoredObject.modified` is told by, whatever that of this machine says.

        Raises:
            RegistryError: the store does not take an object.
        """
        name = f"{CLOCK}/{secrets.token_hex(8)}"
        self.create(name, b"")
        found = self.find(name)
        self.delete(name)
        if found is None:
            raise RegistryError(f"{self.url}/{name}: has gone as soon as it was written")
        return found.modified

    def put_room_aside(self) -> None:  # noqa: B027  few stores can be full
        """Take a little room, if there is some, for the day when there is none: see `give_room`."""

    def give_room(self) -> None:  # noqa: B027
        """Free what was put aside."""

    def leftovers(self) -> list[StoredObject]:
        """What writers that were killed left and `objects` does not show: unfinished files and empty folders.

        A store that drops unfinished uploads by itself, as by a rule of a bucket's life cycle, has none to show.
        """
        return []


@contextmanager
def in_one_line(url: str, action: str, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """FileNotFoundError and our own errors as they are; `errors`, what else a store says, as a RegistryError."""
    try:
        yield
    except (FileNotFoundError, CCEError):
        raise
    except errors as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RegistryError(f"{url}: cannot {action}: {reason}") from error
