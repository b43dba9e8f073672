"""The files that a user means by a path, and the errors of reading them."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa

from torchrec_cce.errors import DataFileError

PathLike: TypeAlias = str | os.PathLike[str]


def files_of(
    paths: PathLike | Sequence[PathLike], inside: Callable[[Path], Sequence[Path]], pattern: str
) -> list[Path]:
    """The files that `paths` stands for, in this order. A file stands for itself, a folder for what is `inside` it.

    A path with `*`, `?` or `[…]` that is no file itself is a pattern. It stands for all files that match, sorted by
    name, and numbers in names by their value: `day_*` is `day_0`, `day_1`, `day_2`, …, `day_10`.

    Args:
        pattern: what is looked for in folders, for the message.

    Raises:
        DataFileError: a path that is not there, a pattern that nothing matches, or a folder without such a file.
    """
    files: list[Path] = []
    for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
        for match in _matches(Path(path)):
            found = inside(match) if match.is_dir() else [match]
            if not found:
                raise DataFileError(f"{match}: no {pattern} in this folder")
            files += found
    return files


@contextmanager
def as_data_file_error(path: Path, kind: str) -> Iterator[None]:
    """Turn what Arrow and the disk raise into a DataFileError."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataFileError(f"{path}: cannot be read as {kind} ({reason})") from error


def _matches(path: Path) -> list[Path]:
    if path.exists():
        return [path]
    if not set("*?[") & set(str(path)):
        raise DataFileError(f"{path}: no such file or folder")
    found = sorted(glob(str(path), recursive=True), key=_by_number)
    if not found:
        raise DataFileError(f"{path}: no file matches this pattern; `ls` shows what it should match")
    return [Path(name) for name in found]


def _by_number(name: str) -> tuple[list[str | int], str]:
    """A key by which `day_2` comes before `day_10`. Text and numbers alternate, so that like is compared with like."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if position % 2 else part for position, part in enumerate(parts)], name
