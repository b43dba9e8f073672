"""The files that a user means by a path, and the errors of reading them."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TypeAlias

import pyarrow as pa

from torchrec_cce.data.names import in_order, meant, split_pattern, walk
from torchrec_cce.errors import DataFileError

PathLike: TypeAlias = str | os.PathLike[str]


def files_of(paths: PathLike | Sequence[PathLike], suffixes: Sequence[str]) -> list[Path]:
    """The files that `paths` stands for, in this order; see `torchrec_cce.data.names`.

    What a pattern matches is sorted by name, and numbers in names by their value: `day_*` is `day_0`, `day_1`, `day_2`,
    …, `day_10`.

    Args:
        suffixes: of data files, which a folder stands for; none where a folder is not allowed.

    Raises:
        DataFileError: a path that is not there, a pattern that nothing matches, or a folder without such a file.
    """
    return [
        file
        for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)
        for file in _files(os.fspath(path), suffixes)
    ]


@contextmanager
def as_data_file_error(path: Path, kind: str) -> Iterator[None]:
    """Turn what Arrow and the disk raise into a DataFileError."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataFileError(f"{path}: cannot be read as {kind} ({reason})") from error


def _files(text: str, suffixes: Sequence[str]) -> list[Path]:
    if "://" in text:
        raise DataFileError(f"{text}: data is read from a disk; copy it to one, or mount the bucket")
    path = Path(text)
    if path.is_dir():
        return [path / name for name in _in_folder(path, [], suffixes)] or _refuse(path, suffixes)
    if path.exists():
        return [path]
    root, pattern = split_pattern(text)
    if not pattern:
        raise DataFileError(f"{path}: no such file or folder")
    found = _in_folder(Path(root), pattern, suffixes) if Path(root).is_dir() else []
    if not found:
        raise DataFileError(f"{path}: no file matches this pattern; `ls` shows what it should match")
    return [Path(root, name) for name in found]


def _in_folder(folder: Path, pattern: Sequence[str], suffixes: Sequence[str]) -> list[str]:
    found: list[tuple[str, str]] = []
    folders: set[str] = set()
    for name in walk(folder, pattern):
        if name.endswith("/"):
            folders.add(name.rstrip("/"))
        elif (parts := meant(name, pattern, suffixes)) is not None:
            found.append(parts)
    empty = folders - {matched for matched, _ in found}
    if empty and "**" not in pattern:
        _refuse(folder / min(empty), suffixes)
    found.sort(key=lambda parts: (_by_number(parts[0]), in_order(parts[1])))
    return ["/".join(filter(None, parts)) for parts in found]


def _refuse(folder: Path, suffixes: Sequence[str]) -> NoReturn:
    if not suffixes:
        raise DataFileError(f"{folder}: a folder; name the files in it, or a pattern such as {folder / 'day_*'}")
    raise DataFileError(f"{folder}: no {' and no '.join(f'*{suffix}' for suffix in suffixes)} in this folder")


def _by_number(name: str) -> tuple[list[str | int], str]:
    """A key by which `day_2` comes before `day_10`. Text and numbers alternate, so that like is compared with like."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if position % 2 else part for position, part in enumerate(parts)], name
