"""Who holds a lock: what its file says, for people and for the processes that want it."""

import json
import os
import secrets
import socket
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds a lock."""

    host: str
    pid: int
    since: str
    """ISO 8601, UTC, by its own clock."""
    place: str | None = None
    """The boot of its host and the space of its process IDs; None where that is not known."""
    started: str | None = None
    """When the process was started: a later one of the same ID has another value."""
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    """Of this time that it holds the lock, and of no other."""

    @classmethod
    def this_process(cls) -> "Holder":
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            since=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            place=_place(),
            started=_started(os.getpid()),
        )

    @classmethod
    def from_json(cls, document: bytes) -> "Holder | None":
        """None if the document is empty, half written or damaged."""
        try:
            return cls(**json.loads(document))
        except (ValueError, TypeError, RecursionError):
            return None

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @property
    def has_ended(self) -> bool:
        """Whether it was a process of this machine that is no more. False where that cannot be told from here."""
        return None not in (self.place, self.started) and self.place == _place() and self.started != _started(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


def _place() -> str | None:
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """In clock ticks since the boot; None if there is no such process, or it is dead and was not waited for."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else fields[18]
