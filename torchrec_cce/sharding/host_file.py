"""An array in one file of each host, written by all ranks and mapped by all ranks of the host: one copy of a map."""

import os
import secrets
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from torchrec_cce.maps.local_copy import default_cache
from torchrec_cce.sharding.agreement import on_all_ranks, on_first_rank

_CHUNK_ROWS = 1 << 20

Array = npt.NDArray[np.unsignedinteger]


class HostFile:
    """A `[n, c]` array that is in the making. Rank `r` writes rows `bounds[r]` to `bounds[r + 1] − 1`.

    The ranks of a host are those that see the same folder: this machine's cache folder, or in it what containers share.
    """

    def __init__(self, path: Path, *, shape: tuple[int, int], dtype: np.dtype[np.unsignedinteger]) -> None:
        self._path = path
        self._shape, self._dtype = shape, dtype
        world_size, rank = dist.get_world_size(), dist.get_rank()
        self._bounds = [shape[0] * r // world_size for r in range(world_size + 1)]
        folder = path.parent.stat()
        hosts: list[object] = [None] * world_size
        dist.all_gather_object(hosts, (socket.gethostname(), folder.st_dev, folder.st_ino))
        self._num_hosts = len(set(hosts))
        self._is_leader = hosts.index(hosts[rank]) == rank
        self._beyond = [host != hosts[rank] for host in hosts]

        def create() -> None:
            if self._is_leader:
                with path.open("xb") as file:
                    os.posix_fallocate(file.fileno(), 0, max(1, shape[0] * shape[1] * dtype.itemsize))

        on_all_ranks(create)  # now, and not by a signal in the middle of writing, a full disk is an error

    def mine(self) -> tuple[int, int, Array]:
        """The first row of this rank's share, the row after its last, and the share `[m, c]` to write to."""
        start, stop = self._bounds[dist.get_rank() :][:2]
        return start, stop, self._rows(start, stop, "r+")

    def everything(self) -> Array:
        """Exchange the shares between hosts, and map the whole array for reading. Every rank calls it, once.

        When it returns, it has returned on every rank, or raised the same error on all.
        """
        for owner, (start, stop) in enumerate(pairwise(self._bounds)):
            if self._num_hosts > 1:
                self._send(owner, start, stop)
        dist.barrier()
        return on_all_ranks(lambda: self._rows(0, self._shape[0], "r"))

    def _send(self, owner: int, start: int, stop: int) -> None:
        """From the owner to the leaders of other hosts, a chunk at a time."""
        for first in range(start, stop, _CHUNK_ROWS):
            last = min(first + _CHUNK_ROWS, stop)
            if dist.get_rank() == owner:
                chunk = np.array(self._rows(first, last, "r"))
            else:
                chunk = np.empty((last - first, self._shape[1]), self._dtype)
            dist.broadcast(torch.from_numpy(chunk.reshape(-1).view(np.uint8)), src=owner)
            if self._is_leader and self._beyond[owner]:
                self._rows(first, last, "r+")[:] = chunk

    def _rows(self, start: int, stop: int, mode: str) -> Array:
        shape = (stop - start, self._shape[1])
        if start == stop:
            return np.empty(shape, self._dtype)
        offset = start * self._shape[1] * self._dtype.itemsize
        return np.memmap(self._path, self._dtype, mode, offset, shape)  # type: ignore[call-overload,no-any-return]


@contextmanager
def host_files(
    sizes: Sequence[tuple[tuple[int, int], np.dtype[np.unsignedinteger]]], folder: Path | None = None
) -> Iterator[list[HostFile]]:
    """A file for each `(shape, dtype)`, whose names are gone when the block ends, however it does. All ranks enter it.

    What is mapped by then stays until nobody maps it any more: a process that is killed later leaves nothing behind.

    Args:
        folder: on a disk with room for all of them; by default in the cache folder (`TORCHREC_CCE_CACHE`).
    """
    folder = folder or default_cache() / "live"
    on_all_ranks(lambda: folder.mkdir(parents=True, exist_ok=True))
    token = on_first_rank(lambda: secrets.token_hex(8))
    paths = [folder / f"{token}.{number}" for number in range(len(sizes))]
    try:
        yield [HostFile(path, shape=shape, dtype=dtype) for path, (shape, dtype) in zip(paths, sizes, strict=True)]
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
