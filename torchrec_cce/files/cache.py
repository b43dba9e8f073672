"""The cache folder of this machine, and files without a name, whose space the system frees by itself.

A file without a name serves as memory that the kernel may write to disk. Nothing is left of it when nobody has it open
or maps it any more, also after a kill.
"""

import os
import tempfile
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
from platformdirs import user_cache_path

_COPIED_BYTES = 8 << 20

Number = TypeVar("Number", bound=np.generic)


def default_cache() -> Path:
    """Where this machine keeps what it can make again: `TORCHREC_CCE_CACHE`, or the user's cache folder."""
    chosen = os.environ.get("TORCHREC_CCE_CACHE")
    return Path(chosen) if chosen else user_cache_path("torchrec_cce")


def live_folder() -> Path:
    """The part of the cache folder for files that live while some process uses them. It need not exist."""
    return default_cache() / "live"


def reserve(file: BinaryIO, num_bytes: int) -> None:
    """Make an empty file `num_bytes` zeros long. Raises OSError if its disk has no room for all of them.

    A full disk is then an error at once, and not a SIGBUS while somebody writes to a mapping of the file.
    """
    os.posix_fallocate(file.fileno(), 0, max(1, num_bytes))


def scratch_file(folder: Path, num_bytes: int) -> BinaryIO:
    """A file of zeros without a name.

    Raises:
        OSError: the disk has no room for all of it, or `folder` cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file: BinaryIO = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  the caller's to close
    try:
        reserve(file, num_bytes)
    except OSError as error:
        file.close()
        raise OSError(error.errno, f"{error.strerror}; {num_bytes} bytes are needed there", str(folder)) from error
    return file


def scratch_array(folder: Path, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """A zeroed array, memory-mapped from a `scratch_file`. Raises as that does."""
    with scratch_file(folder, int(np.prod(shape)) * np.dtype(dtype).itemsize) as file:
        return np.asarray(np.memmap(file, dtype, "r+", shape=shape))


def scratch_copy(array: npt.NDArray[Number]) -> npt.NDArray[Number]:
    """A copy of `array: [n]` as it is now, in a `scratch_file` of the live folder, mapped for reading.

    Nothing of its size is held in private memory. Raises as `scratch_file` does.
    """
    if not len(array):
        return array  # nothing of nothing changes, and it cannot be mapped
    at_a_time = max(1, _COPIED_BYTES // array.itemsize)
    with scratch_file(live_folder(), array.nbytes) as file:
        for start in range(0, len(array), at_a_time):
            file.write(array[start : start + at_a_time].data)
        file.flush()
        copy: npt.NDArray[Number] = np.memmap(file, array.dtype, "r", shape=array.shape)
        return copy


def path_of(file: BinaryIO) -> str:
    """Under which other processes of this machine open a file without a name while this process has it open."""
    return f"/proc/{os.getpid()}/fd/{file.fileno()}"
