"""Which files a user means."""

import os
import re
from collections.abc import Callable, Sequence
from glob import glob
from pathlib import Path
from typing import TypeAlias

from torchrec_cce.errors import DataFileError

PathLike: TypeAlias = str | os.PathLike[str]


def files_of(
    paths: PathLike | Sequence[PathLike], inside: Callable[[Path], Sequence[Path]], pattern: str
) -> list[Path]:
    """The files that `paths` stands for, in this order: a file itself, a folder what is `inside` it.

    A path with `*`, `?` or `[…]` that is no file itself is a pattern. It stands for all that match, by name, where
    numbers count by their value: `day_*` is `day_0`, `day_1`, `day_2`, …, `day_10`.

    Args:
        pattern: what is looked for in folders, for the message.

    Raises:
        DataFileError: a path that is not there, a pattern that nothing matches, or a folder without such a file.
    """
    files: list[Path] = []
    for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
        for one in _matches(Path(path)):
            found = inside(one) if one.is_dir() else [one]
            if not found:
                raise DataFileError(f"{one}: no {pattern} in this folder")
            files += found
    return files


def _matches(path: Path) -> list[Path]:
    if path.exists():
        return [path]
    if not set("*?[") & set(str(path)):
        raise DataFileError(f"{path}: no such file or folder")
    found = sorted(glob(str(path), recursive=True), key=_by_number)
    if not found:
        raise DataFileError(f"{path}: no file matches this pattern; `ls` shows what it should match")
    return [Path(one) for one in found]


def _by_number(name: str) -> tuple[list[str | int], str]:
    """A key by which `day_2` comes before `day_10`. Text and numbers alternate, so that like is compared with like."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if position % 2 else part for position, part in enumerate(parts)], name
