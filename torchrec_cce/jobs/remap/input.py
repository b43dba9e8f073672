"""The Parquet files that a job reads: a file, a folder with all below it, or a glob, on a disk or in a store."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyarrow as pa

from torchrec_cce.errors import CCEError, DataFileError
from torchrec_cce.maps.store import Store, open_store
from torchrec_cce.maps.store.store import StoredObject

_WILD = set("*?[")


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """A file as it was when it was listed."""

    name: str
    """Path in its folder, with `/`."""
    num_bytes: int
    stamp: str
    """Changes when the file does: its modification time in ns, or what the store calls its content."""

    def hive_keys(self) -> list[str]:
        """The keys of the folders `key=value` that it lies in."""
        return [part.split("=")[0] for part in self.name.split("/")[:-1] if "=" in part]


def list_input(text: str, options: Mapping[str, Any]) -> tuple[str, list[InputFile]]:
    """The folder that all files are in, and the files by their names in it.

    Names that begin with `_` or `.`, of files and of folders, are passed over.

    Args:
        text: a Parquet file, a folder (its `*.parquet`, also in folders below), or a glob in which `*` and `?` do not
            match `/` and `**` matches any folders.
        options: for the object store, see `open_store`.

    Raises:
        DataFileError: no such file.
        RegistryError: the store did not answer.
    """
    text = text.rstrip("/")
    folder, pattern = _split(text)
    if pattern is None:
        found = list(_walk(folder, options))
        if found or ("://" not in text and Path(text).is_dir()):
            files = [file for file in found if file.name.endswith(".parquet")]
            if not files:
                raise DataFileError(f"{text}: no *.parquet in this folder or below it")
            return folder, files
        folder, _, pattern = text.rpartition("/")
        folder = folder or ("/" if text.startswith("/") else ".")
        file = stat_input(open_store(folder, **options), pattern)
        if file is None:
            raise DataFileError(f"{text}: no such file or folder")
        return folder, [file]
    wanted = pattern.split("/")
    files = [file for file in _walk(folder, options) if _matches(file.name.split("/"), wanted)]
    if not files:
        raise DataFileError(f"{text}: no file matches")
    return folder, files


def stat_input(storage: Store, name: str) -> InputFile | None:
    """A file as it is now, None if there is none."""
    path = storage.path(name)
    if path is not None:
        try:
            stat = path.stat()
        except FileNotFoundError:
            return None
        return InputFile(name=name, num_bytes=stat.st_size, stamp=str(stat.st_mtime_ns))
    found = storage.find(name)
    return None if found is None else _of_object(found)


@contextmanager
def reading(name: str, kind: str = "Parquet") -> Iterator[None]:
    """Turn what goes wrong while a file is read as of some kind into a DataFileError of one line."""
    try:
        yield
    except CCEError:
        raise
    except FileNotFoundError as error:
        raise DataFileError(f"{name}: no such file; it has gone since the job began") from error
    except (pa.ArrowException, OSError, ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataFileError(f"{name}: cannot be read as {kind} ({reason})") from error


def _walk(folder: str, options: Mapping[str, Any]) -> Iterator[InputFile]:
    """All files in a folder and below, in the order of their names."""
    storage = open_store(folder, **options)
    root = storage.path()
    if root is None:
        for stored in storage.objects(""):
            if not is_hidden(stored.name):
                yield _of_object(stored)
        return
    names = [
        Path(where, file).relative_to(root).as_posix()
        for where, _, files in os.walk(root, followlinks=True)
        for file in files
    ]
    for name in sorted(names):
        found = None if is_hidden(name) else stat_input(storage, name)
        if found is not None:
            yield found


def _of_object(found: StoredObject) -> InputFile:
    return InputFile(name=found.name, num_bytes=found.num_bytes, stamp=found.etag or found.modified.isoformat())


def is_hidden(name: str) -> bool:
    """Whether a name in a folder, or one of the folders that it lies in, begins with `_` or `.`."""
    return any(part.startswith(("_", ".")) for part in name.split("/"))


def _split(text: str) -> tuple[str, str | None]:
    """The folder before the first part with a wildcard, and the rest, None if there is none."""
    head, mark, path = text.rpartition("://") if "://" in text else ("", "", text)
    parts = path.split("/")
    wild = next((number for number, part in enumerate(parts) if set(part) & _WILD), None)
    if wild is None:
        return text, None
    folder = "/".join(parts[:wild])
    if not folder and not mark:
        folder = "/" if path.startswith("/") else "."
    return head + mark + folder, "/".join(parts[wild:])


def _matches(parts: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])
