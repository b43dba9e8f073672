"""A physical table that lies in shards on several ranks, read and written as a whole."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor

from torchrec_cce.modules.recluster import TableRows, to_array


class ShardedStore:
    """The rows of one table of a `DistributedModelParallel` model. Every rank calls every method, in the same order.

    Args:
        weight: the table's entry in the model's `state_dict()`, whose shards are the memory that is trained.
        state: the table's entry in the optimizer's `state_dict()["state"]`; empty on a rank without a shard.
    """

    def __init__(self, weight: torch.Tensor | ShardedTensor, state: dict[str, Any]) -> None:
        self._weight = weight
        num_rows = size_of(weight)[0]
        sizes = {
            name: size_of(value) for name, value in state.items() if isinstance(value, torch.Tensor | ShardedTensor)
        }
        mine = {name: size for name, size in sizes.items() if size[:1] == (num_rows,)}
        everyones: list[dict[str, tuple[int, ...]]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everyones, mine)
        self._sizes = {name: size for sizes in everyones for name, size in sorted(sizes.items())}
        self._states = {name: state.get(name) for name in self._sizes}

    def read(self) -> TableRows:
        return TableRows(
            weights=to_array(_gather(self._weight, size_of(self._weight))),
            states={name: to_array(_gather(value, self._sizes[name])) for name, value in self._states.items()},
        )

    def write(self, rows: TableRows) -> None:
        scatter(self._weight, torch.from_numpy(rows.weights))
        for name, value in self._states.items():
            scatter(value, torch.from_numpy(rows.states[name]))


def size_of(value: torch.Tensor | ShardedTensor) -> tuple[int, ...]:
    """From a sharded tensor's metadata: its `size()` goes through a class method that warns of its deprecation."""
    return tuple(value.metadata().size if isinstance(value, ShardedTensor) else value.size())


def _gather(value: torch.Tensor | ShardedTensor | None, size: tuple[int, ...]) -> torch.Tensor:
    """The whole tensor on every rank. Each element has one owner, so that the sum over ranks is exact."""
    if value is not None and not isinstance(value, ShardedTensor):
        return value.detach()
    whole = torch.zeros(size)
    for part, shard in _shards(value, whole):
        part.copy_(shard)
    dist.all_reduce(whole)
    return whole


def scatter(value: torch.Tensor | ShardedTensor | None, whole: torch.Tensor) -> None:
    """Write `whole` into the memory that this rank trains."""
    with torch.no_grad():
        if value is not None and not isinstance(value, ShardedTensor):
            value.copy_(whole)
            return
        for part, shard in _shards(value, whole):
            shard.copy_(part)


def _shards(value: ShardedTensor | None, whole: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each local shard with the region of `whole` that it is."""
    pairs = []
    for shard in [] if value is None else value.local_shards():
        region = whole
        for dim, (offset, length) in enumerate(
            zip(shard.metadata.shard_offsets, shard.metadata.shard_sizes, strict=True)
        ):
            region = region.narrow(dim, offset, length)
        pairs.append((region, shard.tensor.view(region.shape)))
    return pairs
