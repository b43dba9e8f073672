"""JSON documents that notice any change to themselves, by a SHA-256 of their content; and that of a file."""

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from torchrec_cce.errors import MapFileError

T = TypeVar("T")


def seal(content: dict[str, Any]) -> bytes:
    """The document of `content`: equal content, equal bytes. Raises ValueError for NaN or infinite numbers."""
    text = json.dumps(content, allow_nan=False)
    sealed = {"content": content, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return (json.dumps(sealed, allow_nan=False, indent=1) + "\n").encode()


def unseal(document: bytes, name: str) -> dict[str, Any]:
    """The content of a document that `seal` made.

    Raises:
        MapFileError: it is cut short, damaged in any bit, or something else; names the document.
    """
    try:
        content = json.loads(document)["content"]
        # Sealed anew, it must be the same to the last byte: no change is too small, in white space or in a number.
        whole = isinstance(content, dict) and seal(content) == document
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MapFileError(f"{name}: not a complete document ({error})") from error
    if not whole:
        raise MapFileError(f"{name}: its content and its SHA-256 differ; the document is damaged")
    return content  # type: ignore[no-any-return]


def parse(adapter: TypeAdapter[T], document: bytes, name: str, *, newest_format: int, oldest_format: int = 1) -> T:
    """The object that a sealed document describes. Its content has a number `format`.

    Raises:
        MapFileError: the document is damaged, of another format, or not of this kind; names it and what is wrong.
    """
    content = unseal(document, name)
    found = content.get("format")
    if isinstance(found, int) and found > newest_format:
        raise MapFileError(
            f"{name}: format {found} was written by a later torchrec_cce; this one reads formats up to "
            f"{newest_format}, upgrade it"
        )
    if isinstance(found, int) and found < oldest_format:
        raise MapFileError(
            f"{name}: format {found} is older than {oldest_format}, the oldest that this torchrec_cce reads; train or "
            "publish anew"
        )
    try:
        return adapter.validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise MapFileError(f"{name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


_PIECE_BYTES = 1 << 20


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file, read in pieces: a mapping would count as this process's memory."""
    content = hashlib.sha256()
    piece = memoryview(bytearray(_PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(piece):
            content.update(piece[:length])
    return content.hexdigest()
