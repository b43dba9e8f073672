"""Frequencies of IDs in an `.npz` archive, unpacked to files that any process can memory-map."""

import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from torchrec_cce.errors import ConfigError

_SUFFIX = ".npy"


def unpack_frequencies(archive: Path, folder: Path, num_ids: Mapping[str, int]) -> dict[str, Path]:
    """Write each array of `archive` to a `.npy` file in the new `folder`, in bounded memory.

    Args:
        archive: table → [n] int64.
        num_ids: table → n, of all tables that there are.

    Returns:
        table → its file, of the tables that are in the archive.

    Raises:
        ConfigError: no such archive; a table that is not there, or an array that is not [n] int64.
    """
    folder.mkdir(parents=True)
    files = {}
    try:
        with zipfile.ZipFile(archive) as opened:
            names = [name.removesuffix(_SUFFIX) for name in opened.namelist()]
            unknown = sorted(set(names) - set(num_ids))
            if unknown:
                raise ConfigError(f"{archive}: frequencies of {unknown}; the CCE tables are {sorted(num_ids)}")
            for number, name in enumerate(names):
                files[name] = folder / f"{number:04d}{_SUFFIX}"
                with opened.open(name + _SUFFIX) as packed, files[name].open("wb") as file:
                    shutil.copyfileobj(packed, file, 1 << 20)
                _check(archive, name, files[name], num_ids[name])
    except (zipfile.BadZipFile, FileNotFoundError, KeyError) as error:
        raise ConfigError(f"{archive}: not an .npz archive of frequencies ({error})") from error
    return files


def _check(archive: Path, name: str, file: Path, num_ids: int) -> None:
    try:
        array = np.load(file, mmap_mode="r")
    except ValueError as error:
        raise ConfigError(f"{archive}: {name!r} is not an array of numbers ({error})") from error
    if array.shape != (num_ids,) or array.dtype != np.int64:
        raise ConfigError(
            f"{archive}: frequencies of {name!r} are {array.dtype} {list(array.shape)}, not int64 [{num_ids}], one a "
            "row of its map"
        )
