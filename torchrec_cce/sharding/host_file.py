"""An array in one file of each host, written by all ranks and mapped by all ranks of the host: one copy of a map."""

import secrets
import socket
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from torchrec_cce.files.cache import live_folder, reserve
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.vocabulary import Vocabulary
from torchrec_cce.sharding.agreement import from_each_rank, on_all_ranks, on_first_rank

_CHUNK_ROWS = 1 << 20

Number = TypeVar("Number", bound=np.generic)


class HostFile(Generic[Number]):
    """A `[n, c]` array in the making, zero at first.

    Either the work is spread over all ranks: rank `r` of `R` writes the rows from `n·r/R` to `n·(r + 1)/R` (`mine`),
    and `everything` brings them to all hosts. Or every host has it done for itself: the rank that is number `r` of the
    `R` of its host writes those rows (`ours`), and `whole` maps them; or one rank of the host writes all (`filled`).

    The ranks of a host are those that see the same folder. The file has a name only until all of them have opened it:
    its space is free again when nobody maps it any more, also when they are killed. Every rank calls every method.

    Args:
        folder: on a disk with room for the array; by default in the cache folder (`TORCHREC_CCE_CACHE`).

    Raises:
        OSError: on all ranks, if one of them cannot create or open its host's file, for example because a disk is full.
    """

    def __init__(self, shape: tuple[int, int], dtype: np.dtype[Number], folder: Path | None = None) -> None:
        self._shape, self._dtype = shape, dtype
        world_size, rank = dist.get_world_size(), dist.get_rank()
        self._bounds = [shape[0] * r // world_size for r in range(world_size + 1)]
        folder = folder or live_folder()
        on_all_ranks(lambda: folder.mkdir(parents=True, exist_ok=True))
        seen = folder.stat()
        hosts = from_each_rank((socket.gethostname(), seen.st_dev, seen.st_ino))
        self._num_hosts = len(set(hosts))
        self._is_leader = hosts.index(hosts[rank]) == rank
        self._elsewhere = [host != hosts[rank] for host in hosts]
        numbers = [(hosts[:r].count(host), hosts.count(host)) for r, host in enumerate(hosts)]
        self.host_bounds = [(shape[0] * r // of, shape[0] * (r + 1) // of) for r, of in numbers]
        """Rank → the first row, and the row after the last, that it writes of its host's array (`ours`)."""
        path = folder / on_first_rank(lambda: secrets.token_hex(8))
        try:
            on_all_ranks(lambda: self._create(path))
            self._file: BinaryIO = on_all_ranks(lambda: path.open("r+b"))
        finally:
            if self._is_leader:
                path.unlink(missing_ok=True)

    def mine(self) -> tuple[int, int, npt.NDArray[Number]]:
        """The first row of this rank's share, the row after its last, and the share `[m, c]` to write to."""
        start, stop = self._bounds[dist.get_rank() :][:2]
        return start, stop, self._rows(start, stop, "r+")

    def ours(self) -> tuple[int, int, npt.NDArray[Number]]:
        """As `mine`, of this rank's share among the ranks of its host."""
        start, stop = self.host_bounds[dist.get_rank()]
        return start, stop, self._rows(start, stop, "r+")

    def whole(self) -> npt.NDArray[Number]:
        """Map the whole array of this host for reading. What its ranks write later is seen there too."""
        return self._rows(0, self._shape[0], "r")

    def filled(self, fill: Callable[[npt.NDArray[Number]], object]) -> npt.NDArray[Number]:
        """Let one rank of each host `fill` the whole array, and map it for reading. What `fill` raises, all raise."""
        on_all_ranks(lambda: fill(self._rows(0, self._shape[0], "r+")) if self._is_leader else None)
        return self.whole()

    def everything(self) -> npt.NDArray[Number]:
        """Exchange the shares of `mine` between hosts, once all are written, and map the whole array for reading."""
        dist.barrier()
        if self._num_hosts > 1:
            for owner, (start, stop) in enumerate(pairwise(self._bounds)):
                self._send(owner, start, stop)
            dist.barrier()
        return self.whole()

    def _create(self, path: Path) -> None:
        if self._is_leader:
            with path.open("xb") as file:
                reserve(file, self._shape[0] * self._shape[1] * self._dtype.itemsize)

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

    def _rows(self, start: int, stop: int, mode: str) -> npt.NDArray[Number]:
        shape = (stop - start, self._shape[1])
        if start == stop:
            return np.empty(shape, self._dtype)
        offset = start * self._shape[1] * self._dtype.itemsize
        return np.memmap(self._file, self._dtype, mode, offset, shape)  # type: ignore[call-overload,no-any-return]


def in_a_file(size: int, dtype: np.dtype[Any], fill: Callable[[npt.NDArray[Any]], object]) -> npt.NDArray[Any]:
    """`[size]`, once one rank of each host has filled it in. Every rank calls it; what `fill` raises, all raise."""
    return HostFile((size, 1), dtype).filled(lambda out: fill(out[:, 0]))[:, 0]


def share_keys(maps: Iterable[PointerMap]) -> None:
    """Let the ranks of a host share what `raw_ids` needs of each map's vocabulary: 8 bytes an ID, kept with it.

    Every rank calls it, with maps of the same vocabularies.

    Raises:
        ConfigError: on all ranks, if the slots of a vocabulary are damaged.
        OSError: on all ranks, if the cache folder (`TORCHREC_CCE_CACHE`) of one has no room.
    """
    for vocabulary in (pointer_map.vocabulary for pointer_map in maps):
        if vocabulary is None:
            continue
        lacks = torch.tensor(int(not vocabulary.has_key_of_position))
        dist.all_reduce(lacks, op=dist.ReduceOp.MAX)
        if lacks:
            vocabulary.reading_keys(_written(vocabulary))


def _written(vocabulary: Vocabulary) -> npt.NDArray[np.int64]:
    file = HostFile((vocabulary.num_ids, 1), np.dtype(np.int64))
    return file.filled(lambda keys: vocabulary.keys(keys[:, 0]))[:, 0]
