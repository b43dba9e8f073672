"""Files without a name: memory that the kernel may write to disk, and that nothing leaves behind."""

import os
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt


def scratch_file(folder: Path, num_bytes: int) -> BinaryIO:
    """A file of zeros whose space is free again when nobody has it open or maps it any more, also after a kill.

    Raises:
        OSError: the disk has no room for all of it, or `folder` cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file: BinaryIO = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  the caller's to close
    try:
        # A full disk is an error now, and not a SIGBUS in the middle of writing.
        os.posix_fallocate(file.fileno(), 0, max(1, num_bytes))
    except OSError as error:
        file.close()
        raise OSError(error.errno, f"{error.strerror}; {num_bytes} bytes are needed there", str(folder)) from error
    return file


def scratch_array(folder: Path, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """A zeroed array, memory-mapped from a `scratch_file`. Raises as that does."""
    with scratch_file(folder, int(np.prod(shape)) * np.dtype(dtype).itemsize) as file:
        return np.asarray(np.memmap(file, dtype, "r+", shape=shape))
