"""SHA-256 of a file."""

import hashlib
from pathlib import Path

_PIECE_BYTES = 1 << 20


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file, read in pieces: a mapping would count as this process's memory."""
    content = hashlib.sha256()
    piece = memoryview(bytearray(_PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(piece):
            content.update(piece[:length])
    return content.hexdigest()
