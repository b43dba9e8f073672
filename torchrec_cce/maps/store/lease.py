"""Locks in stores: the kernel's on a disk, and leases in object stores, which have none.

A lease is an object that its holder writes again every few seconds. It is created if absent, under a number one above
the last: of several who want it, one gets it. A holder that has not written for `LEASE_S` seconds, by the store's
clock, loses it to whoever creates the next number, so that nobody has to clean up. If it wakes up after that, it finds
the higher number before it writes anything else.
"""

import threading
import time
from contextlib import suppress
from datetime import timedelta

from torchrec_cce.errors import JobError, RegistryError
from torchrec_cce.files.holder import Holder
from torchrec_cce.files.lock import FolderLock, check_token, lost
from torchrec_cce.maps.store.store import Store, StoredObject

LEASE_S = 60.0
"""After so many seconds without a sign of its holder, anybody may take a lease."""
_BEATS = 6
"""Signs of life within that time."""
_LOOK_EVERY_S = 0.5


class Lease:
    """A lock on a folder of an object store, held until it is released or its holder is not heard of any more.

    Args:
        folder: where its objects lie, in the store; nothing else does.
        what: what one process at a time does, for messages.

    Raises:
        JobError: another process holds it. Of one that gives no sign this is known only after `LEASE_S` seconds.
        RegistryError: the store did not answer.
    """

    def __init__(self, store: Store, folder: str, *, what: str) -> None:
        self._store, self._folder, self._what = store, folder, what
        self._holder = Holder.this_process()
        self.token = self._holder.token
        self._name = self._take()
        self._released = threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True)
        self._beats.start()

    def check(self) -> None:
        """Raises JobError, as `FolderLock.check`."""
        _check_lease(self._store, self._folder, self.token, what=self._what)

    def release(self) -> None:
        """Let others have the folder. Nothing happens if they have it already."""
        self._released.set()
        self._beats.join()
        with suppress(JobError, RegistryError):
            self.check()
            for each in self._store.objects(self._folder):
                self._store.delete(each.name)

    def _take(self) -> str:
        while True:
            newest = _newest(self._store, self._folder)
            if newest is not None:
                self._outlive(newest)
            name = f"{self._folder}/{1 if newest is None else _number(newest) + 1:08d}"
            if self._store.create(name, self._holder.to_json()):
                return name

    def _outlive(self, lease: StoredObject) -> None:
        """Return when the holder of `lease` has ended, or has given no sign for long enough."""
        holder = _holder_of(self._store, lease.name)
        deadline = time.monotonic() + LEASE_S - self._age_s(lease)
        while holder is not None and not holder.has_ended and time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY_S)
            now = _newest(self._store, self._folder)
            if now is None:
                return
            if now != lease:
                raise JobError(
                    f"{self._store.url}: another process {self._what}: {_holder_of(self._store, now.name) or holder}; "
                    "wait for it, or end it"
                )

    def _age_s(self, lease: StoredObject) -> float:
        """By the store's clock, which an object that is written now tells."""
        name = f"{self._folder}/now-{self.token}"
        self._store.create(name, b"")
        now = self._store.find(name)
        self._store.delete(name)
        return 0.0 if now is None else (now.modified - lease.modified) / timedelta(seconds=1)

    def _beat(self) -> None:
        while not self._released.wait(LEASE_S / _BEATS):
            with suppress(RegistryError):  # that does not answer now; until it does, nothing else is written either
                try:
                    self.check()
                except JobError:
                    return
                with self._store.writer(self._name) as sink:
                    sink.write(memoryview(self._holder.to_json()))

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lock_folder(store: Store, folder: str, *, what: str) -> FolderLock | Lease:
    """Lock a folder of a store by `NAME/lock` in it. Raises as `FolderLock` and `Lease`."""
    path = store.path(_lock_in(folder))
    return Lease(store, _lock_in(folder), what=what) if path is None else FolderLock(path, what=what)


def check_lock(store: Store, folder: str, token: str, *, what: str) -> None:
    """For a worker of the process that locked the folder. Raises JobError if that has it no longer."""
    path = store.path(_lock_in(folder))
    if path is None:
        _check_lease(store, _lock_in(folder), token, what=what)
    else:
        check_token(path, token, what=what)


def _lock_in(folder: str) -> str:
    return f"{folder}/lock"


def _check_lease(store: Store, folder: str, token: str, *, what: str) -> None:
    newest = _newest(store, folder)
    found = None if newest is None else _holder_of(store, newest.name)
    if found is None or found.token != token:
        raise lost(store.url, folder, found, what)


def _newest(store: Store, folder: str) -> StoredObject | None:
    found = [each for each in store.objects(folder) if each.name.rpartition("/")[2].isdigit()]
    return found[-1] if found else None


def _number(lease: StoredObject) -> int:
    return int(lease.name.rpartition("/")[2])


def _holder_of(store: Store, name: str) -> Holder | None:
    try:
        return Holder.from_json(store.read(name))
    except FileNotFoundError:
        return None
