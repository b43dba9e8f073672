"""Which files a user means."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from torchrec_cce.errors import DataFileError

PathLike: TypeAlias = str | os.PathLike[str]


def files_of(
    paths: PathLike | Sequence[PathLike], inside: Callable[[Path], Sequence[Path]], pattern: str
) -> list[Path]:
    """The files that `paths` stands for, in this order: a file itself, a folder what is `inside` it.

    Args:
        pattern: what is looked for in folders, for the message.

    Raises:
        DataFileError: a path that is not there, or a folder without such a file.
    """
    files: list[Path] = []
    for path in map(Path, [paths] if isinstance(paths, str | os.PathLike) else paths):
        if path.is_dir():
            found = inside(path)
            if not found:
                raise DataFileError(f"{path}: no {pattern} in this folder")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise DataFileError(f"{path}: no such file or folder")
    return files
