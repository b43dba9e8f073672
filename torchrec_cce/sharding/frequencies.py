"""How often the IDs of CCE tables were seen, over all ranks: one copy a host, in a file that its ranks share."""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.renumbering import Renumbering
from torchrec_cce.modules.remap import Remap
from torchrec_cce.sharding.agreement import on_all_ranks
from torchrec_cce.sharding.host_file import HostFile, share_keys

Integers = npt.NDArray[np.int64]

_CHUNK = 1 << 16
_MOST_KEPT = 1 << 20
_MOST_RECEIVED = 1 << 18
"""Pairs of a position and its count that a rank takes in at a time."""


class ShardedFrequencies:
    """Counts of the positions of some maps, `[num_ids] int64` a table, zero at first. Every rank calls every method.

    A rank keeps the positions of the IDs that it sees until some rank has its fill of them, or somebody asks for
    totals. Then each is sent to the one rank of every host that owns its part of the host's file, which adds it there.
    So nothing of the size of a table is ever private to a rank, and no two processes write the same number. Counts are
    whole numbers: how many ranks and hosts there are, and when they exchange, changes none.

    The file is gone with the processes that map it: what is to be resumed belongs into a checkpoint.

    Args:
        num_ids: table → positions of its map. Other tables are not counted.
        most_kept: IDs that a rank keeps, beside those of one batch. By default a million: 8 MiB, and some 45 MiB while
            they are sent.

    Raises:
        OSError: on all ranks, if the cache folder (`TORCHREC_CCE_CACHE`) of one has no room: 8 bytes an ID.
    """

    def __init__(self, num_ids: Mapping[str, int], *, most_kept: int = _MOST_KEPT) -> None:
        self._spans: dict[str, slice] = {}
        stop = 0
        for name, n in num_ids.items():
            self._spans[name] = slice(stop, stop + n)
            stop += n
        self._most_kept = most_kept
        self._kept: list[Integers] = []
        if self._spans:
            file = HostFile((stop, 1), np.dtype(np.int64))
            self._bounds = np.array(file.host_bounds)
            self._start, self._stop, ours = file.ours()
            self._ours, self._whole = ours.reshape(-1), file.whole().reshape(-1)

    @classmethod
    def of(cls, counts: Mapping[str, Integers]) -> "ShardedFrequencies":
        """Go on from `counts`, table → [num_ids] int64, possibly memory-mapped, the same on every rank."""
        new = cls({name: len(each) for name, each in counts.items()})
        new._fill(lambda name, positions: counts[name][positions])
        return new

    def count(self, remap: Remap, features: KeyedJaggedTensor, num_bags: int) -> None:
        """Add 1 for every ID in the first `num_bags` bags of each feature, if the map knows it.

        Args:
            remap: with the maps whose positions are counted.
            features: raw IDs, on the CPU.
        """
        for table, feature in remap.table_features:
            if table in self._spans:
                bags = features[feature]
                ids = bags.values()[: bags.offsets()[num_bags] - bags.offsets()[0]]
                positions = remap.pointer_map(table).positions(ids.numpy())
                self._kept.append(self._spans[table].start + positions[positions >= 0])
        if self._spans and self._is_full_anywhere():
            self._exchange()

    def totals(self) -> dict[str, Integers]:
        """Table → [num_ids] int64 over all ranks, mapped from this host's file, which later calls of `count` change."""
        if not self._spans:
            return {}
        self._exchange()
        dist.barrier()  # every owner has added
        return {name: self._whole[span] for name, span in self._spans.items()}

    def moved(self, old: Mapping[str, PointerMap], new: Mapping[str, PointerMap]) -> "ShardedFrequencies":
        """What was counted of each raw ID, by positions of the maps `new`: 0 for an ID that `old` does not know.

        It is this object if the positions are the same; if not, this one remains as it is.

        Args:
            old, new: of each table, the same on every rank.
        """
        renumberings = {name: Renumbering(old=old[name], new=new[name]) for name in self._spans}
        if all(each.changes_nothing for each in renumberings.values()):
            return self
        totals = self.totals()
        share_keys(new[name] for name in self._spans)

        def counted(name: str, positions: slice) -> Integers:
            before = renumberings[name].before(np.arange(positions.start, positions.stop))
            return np.where(before >= 0, totals[name][before], 0)

        there = ShardedFrequencies({name: new[name].num_ids for name in self._spans}, most_kept=self._most_kept)
        there._fill(counted)
        return there

    def _fill(self, counted: Callable[[str, slice], Integers]) -> None:
        """Write this rank's part of its host's file, a chunk at a time; all ranks have written when it returns."""

        def fill() -> None:
            for name, span in self._spans.items():
                first, last = max(span.start, self._start), min(span.stop, self._stop)
                for start in range(first, last, _CHUNK):
                    stop = min(start + _CHUNK, last)
                    positions = slice(start - span.start, stop - span.start)
                    self._ours[start - self._start : stop - self._start] = counted(name, positions)

        on_all_ranks(fill)

    def _is_full_anywhere(self) -> bool:
        """Whether some rank keeps as much as it may: the same answer on all."""
        kept = torch.tensor(sum(map(len, self._kept)))
        dist.all_reduce(kept, op=dist.ReduceOp.MAX)
        return int(kept) > self._most_kept

    def _exchange(self) -> None:
        """Send every kept position to its owners. Nobody adds before all have called this, done with older totals."""
        positions, counts = np.unique(np.concatenate([np.empty(0, np.int64), *self._kept]), return_counts=True)
        self._kept = []
        pairs = np.stack([positions, counts], axis=1)
        parts = np.searchsorted(positions, self._bounds)  # [ranks, 2]: of `pairs`, ascending, what each rank owns
        most = torch.tensor(int(np.diff(parts).max()))
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        piece = max(1, _MOST_RECEIVED // len(parts))
        for first in range(0, int(most), piece):
            received = _all_to_all([pairs[start + first : min(start + first + piece, stop)] for start, stop in parts])
            np.add.at(self._ours, received[:, 0] - self._start, received[:, 1])


def _all_to_all(parts: list[Integers]) -> Integers:
    """Rank → `[m, 2]` for it. Returns `[m, 2]` from all ranks."""
    sent = torch.tensor([len(part) for part in parts])
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    pairs = torch.empty((int(received.sum()), 2), dtype=torch.int64)
    dist.all_to_all_single(pairs, torch.from_numpy(np.concatenate(parts)), received.tolist(), sent.tolist())
    return pairs.numpy()
