"""Files with one bit that is not what was written."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def flip(content: bytes, rng: random.Random) -> bytes:
    """`content` with one random bit flipped."""
    position, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
    return content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :]


@contextmanager
def flipped(path: Path, rng: random.Random) -> Iterator[None]:
    """One random bit of a file is flipped in place, and flipped back in the end. Its modification time stays."""
    position, bit = rng.randrange(path.stat().st_size), 1 << rng.randrange(8)
    _flip(path, position, bit)
    try:
        yield
    finally:
        _flip(path, position, bit)


def _flip(path: Path, position: int, bit: int) -> None:
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ bit]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
