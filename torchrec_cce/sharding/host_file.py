"""An array in one file of each host, written by all ranks and mapped by all ranks of the host: one copy of a map."""

import os
import secrets
import socket
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from torchrec_cce.maps.local_copy import default_cache
from torchrec_cce.sharding.agreement import on_all_ranks, on_first_rank

_CHUNK_ROWS = 1 << 20

Array = npt.NDArray[np.unsignedinteger]


class HostFile:
    """A `[n, c]` array in the making. Rank `r` of `R` writes the rows from `n·r/R` to `n·(r + 1)/R`.

    The ranks of a host are those that see the same folder. The file has a name only until all of them have opened it:
    its space is free again when nobody maps it any more, also when they are killed. Every rank calls every method.

    Args:
        folder: on a disk with room for the array; by default in the cache folder (`TORCHREC_CCE_CACHE`).

    Raises:
        OSError: on all ranks, if one of them cannot create or open its host's file, for example because a disk is full.
    """

    def __init__(self, shape: tuple[int, int], dtype: np.dtype[np.unsignedinteger], folder: Path | None = None) -> None:
        self._shape, self._dtype = shape, dtype
        world_size, rank = dist.get_world_size(), dist.get_rank()
        self._bounds = [shape[0] * r // world_size for r in range(world_size + 1)]
        folder = folder or default_cache() / "live"
        on_all_ranks(lambda: folder.mkdir(parents=True, exist_ok=True))
        seen = folder.stat()
        hosts: list[object] = [None] * world_size
        dist.all_gather_object(hosts, (socket.gethostname(), seen.st_dev, seen.st_ino))
        self._num_hosts = len(set(hosts))
        self._is_leader = hosts.index(hosts[rank]) == rank
        self._elsewhere = [host != hosts[rank] for host in hosts]
        path = folder / on_first_rank(lambda: secrets.token_hex(8))
        try:
            on_all_ranks(lambda: self._create(path))
            self._file: BinaryIO = on_all_ranks(lambda: path.open("r+b"))
        finally:
            if self._is_leader:
                path.unlink(missing_ok=True)

    def mine(self) -> tuple[int, int, Array]:
        """The first row of this rank's share, the row after its last, and the share `[m, c]` to write to."""
        start, stop = self._bounds[dist.get_rank() :][:2]
        return start, stop, self._rows(start, stop, "r+")

    def everything(self) -> Array:
        """Exchange the shares between hosts, once all are written, and map the whole array for reading."""
        dist.barrier()
        if self._num_hosts > 1:
            for owner, (start, stop) in enumerate(pairwise(self._bounds)):
                self._send(owner, start, stop)
            dist.barrier()
        return self._rows(0, self._shape[0], "r")

    def _create(self, path: Path) -> None:
        if self._is_leader:
            with path.open("xb") as file:
                # A full disk is an error now, and not a SIGBUS in the middle of writing.
                os.posix_fallocate(file.fileno(), 0, max(1, self._shape[0] * self._shape[1] * self._dtype.itemsize))

    def _send(self, owner: int, start: int, stop: int) -> None:
        """From the owner to the leaders of other hosts, a chunk at a time."""
        for first in range(start, stop, _CHUNK_ROWS):
            last = min(first + _CHUNK_ROWS, stop)
            if dist.get_rank() == owner:
                chunk = np.array(self._rows(first, last, "r"))
            else:
                chunk = np.empty((last - first, self._shape[1]), self._dtype)
            dist.broadcast(torch.from_numpy(chunk.reshape(-1).view(np.uint8)), src=owner)
            if self._is_leader and self._elsewhere[owner]:
                self._rows(first, last, "r+")[:] = chunk

    def _rows(self, start: int, stop: int, mode: str) -> Array:
        shape = (stop - start, self._shape[1])
        if start == stop:
            return np.empty(shape, self._dtype)
        offset = start * self._shape[1] * self._dtype.itemsize
        return np.memmap(self._file, self._dtype, mode, offset, shape)  # type: ignore[call-overload,no-any-return]
