"""The Parquet files that a job reads: a file, a folder with all below it, or a glob, on a disk or in a store."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from torchrec_cce.data.names import in_order, meant, split_pattern, walk
from torchrec_cce.errors import CCEError, DataFileError
from torchrec_cce.maps.store import Store, open_store
from torchrec_cce.maps.store.store import StoredObject


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

    Args:
        text: a Parquet file, a folder (its `*.parquet`, also in folders below), or a glob: see
            `torchrec_cce.data.names`.
        options: for the object store, see `open_store`.

    Raises:
        DataFileError: no such file.
        RegistryError: the store did not answer.
    """
    text = text.rstrip("/") or "/"
    storage = open_store(text, **options)
    root = storage.path()
    if root is not None and "://" in text:
        text = str(root)  # of a file:// URL, in which some letters are written otherwise
    if root is None or root.is_dir():
        files = _listed(storage, [])
        if files:
            return text, files
        if root is not None:
            raise DataFileError(f"{text}: no *.parquet in this folder or below it")
    parent, _, name = text.rpartition("/")
    parent = parent or ("/" if text.startswith("/") else ".")
    file = None if parent.endswith((":/", "://")) else stat_input(open_store(parent, **options), name)
    if file is not None:
        return parent, [file]
    folder, pattern = split_pattern(text)
    if not pattern:
        raise DataFileError(f"{text}: no such file or folder")
    files = _listed(open_store(folder, **options), pattern)
    if not files:
        raise DataFileError(f"{text}: no file matches")
    return folder, files


def stat_input(storage: Store, name: str) -> InputFile | None:
    """A file as it is now, None if there is none."""
    path = storage.path(name)
    if path is not None:
        try:
            stat = path.stat()
        except (FileNotFoundError, NotADirectoryError):
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


def _listed(storage: Store, pattern: Sequence[str]) -> list[InputFile]:
    """The files in a folder and below that a pattern stands for, in the order of their names."""
    root = storage.path()
    if root is None:
        there = {stored.name: _of_object(stored) for stored in storage.objects("")}
    else:
        names = [name for name in walk(root, pattern) if not name.endswith("/")] if root.is_dir() else []
        there = {name: found for name in names if (found := stat_input(storage, name)) is not None}
    names_meant = sorted((name for name in there if meant(name, pattern, (".parquet",)) is not None), key=in_order)
    return [there[name] for name in names_meant]


def _of_object(found: StoredObject) -> InputFile:
    return InputFile(name=found.name, num_bytes=found.num_bytes, stamp=found.etag or found.modified.isoformat())
