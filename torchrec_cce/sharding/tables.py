"""A physical table that lies in shards on several ranks, read and written as a whole."""

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer

from torchrec_cce.clustering.fold import ResidentRows, RowArray
from torchrec_cce.errors import ConfigError, MapMismatchError
from torchrec_cce.maps.residency import Residency
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.methods.cce import CCEConfig
from torchrec_cce.modules.collection import CCECollection
from torchrec_cce.modules.lost_maps import maps_cared_for
from torchrec_cce.modules.recluster import (
    ResidentStore,
    TableReport,
    TableRows,
    resident_rows,
    squares_among,
    to_array,
)
from torchrec_cce.modules.remap import Remap
from torchrec_cce.modules.snapshots import snapshot_of
from torchrec_cce.modules.state_names import joined
from torchrec_cce.sharding.agreement import from_each_rank, on_all_ranks
from torchrec_cce.sharding.host_file import HostFile

_ROWS = 1 << 16
"""Of a large table, at a time."""


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
        self._sizes = {name: size for sizes in from_each_rank(mine) for name, size in sorted(sizes.items())}
        self._states = {name: state.get(name) for name in self._sizes}

    def read(self) -> TableRows:
        return TableRows(
            weights=to_array(_gather(self._weight, size_of(self._weight))),
            states={name: to_array(_gather(value, self._sizes[name])) for name, value in self._states.items()},
        )

    def learned(self, residency: Residency) -> ResidentRows:
        """From files of each host, mapped by its ranks: a few thousand rows at a time are private."""
        name = squares_among(self._states)
        squares = None if name is None else _mapped(self._states[name], self._sizes[name])
        return resident_rows(residency, _mapped(self._weight, size_of(self._weight)), squares)

    def restart(self, parts: Iterable[tuple[int, npt.NDArray[np.float32]]]) -> None:
        self.fill(parts)
        for name, value in self._states.items():
            scatter(value, torch.zeros(self._sizes[name]))

    def fill(self, parts: Iterable[tuple[int, npt.NDArray[np.float32]]]) -> None:
        for first, rows in parts:
            scatter(self._weight, torch.from_numpy(rows), first)

    def rewrite(self, rows: RowArray) -> None:
        num_rows = size_of(self._weight)[0]
        self.fill((first, np.array(rows[first : first + _ROWS])) for first in range(0, num_rows, _ROWS))

    def write(self, rows: TableRows) -> None:
        scatter(self._weight, torch.from_numpy(rows.weights))
        for name, value in self._states.items():
            scatter(value, torch.from_numpy(rows.states[name]))


def size_of(value: torch.Tensor | ShardedTensor) -> tuple[int, ...]:
    """From a sharded tensor's metadata: its `size()` goes through a class method that warns of its deprecation."""
    return tuple(value.metadata().size if isinstance(value, ShardedTensor) else value.size())


def _mapped(value: torch.Tensor | ShardedTensor | None, size: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """All rows, in one file of each host."""
    num_rows, *sizes = size
    width = prod(sizes)
    file = HostFile((num_rows, width), np.dtype(np.float32))
    start, stop, mine = file.mine()
    for first in range(0, num_rows, _ROWS):
        part = to_array(_gather(value, (min(_ROWS, num_rows - first), *sizes), first)).reshape(-1, width)
        here = slice(max(first, start), min(first + _ROWS, stop))
        if here.start < here.stop:
            mine[here.start - start : here.stop - start] = part[here.start - first : here.stop - first]
    return file.everything()


def _gather(value: torch.Tensor | ShardedTensor | None, size: tuple[int, ...], first: int = 0) -> torch.Tensor:
    """The rows from `first` on, so many as `size` says, on every rank. Each element has one owner: the sum is exact."""
    if value is not None and not isinstance(value, ShardedTensor):
        return value.detach()[first : first + size[0]]
    whole = torch.zeros(size)
    for part, shard in _shards(value, whole, first):
        part.copy_(shard)
    dist.all_reduce(whole)
    return whole


def scatter(value: torch.Tensor | ShardedTensor | None, rows: torch.Tensor, first: int = 0) -> None:
    """Write `rows`, which are those from `first` on, into the memory that this rank trains."""
    with torch.no_grad():
        if value is not None and not isinstance(value, ShardedTensor):
            value[first : first + len(rows)] = rows
            return
        for part, shard in _shards(value, rows, first):
            shard.copy_(part)


def _shards(value: ShardedTensor | None, rows: torch.Tensor, first: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each local shard: the part of `rows`, which begin at the row `first`, that it has, and where it has them."""
    pairs = []
    for shard in [] if value is None else value.local_shards():
        (offset, *offsets), (length, *lengths) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        start, stop = max(first, offset), min(first + len(rows), offset + length)
        if start >= stop:
            continue
        region, own = rows[start - first : stop - first], shard.tensor.view(length, *lengths)
        for dim, (begin, size) in enumerate(zip(offsets, lengths, strict=True), start=1):
            region = region.narrow(dim, begin, size)
        pairs.append((region, own[start - offset : stop - offset]))
    return pairs


def collections_of(model: DistributedModelParallel) -> dict[str, CCECollection]:
    """The CCE collections of a sharded model, by the path that their parameters' names start with.

    Raises:
        ConfigError: a training pipeline has batches in flight that were remapped by the maps there are.
    """
    found = {path: module for path, module in model.module.named_modules() if isinstance(module, CCECollection)}
    for path, collection in found.items():
        if not isinstance(collection.remap, Remap):
            raise ConfigError(
                f"{path!r} is in a training pipeline that has batches in flight; call torchrec_cce.sharding.drain first"
            )
    return found


class ResidentRowStore(ResidentStore, Protocol):
    """A store whose rows may be changed in the middle of a phase."""

    def rewrite(self, rows: RowArray) -> None:
        """Write all rows, [m, d] float32; the optimizer's state of each stays."""
        ...


class ShardedTable(NamedTuple):
    """A CCE table of a sharded model."""

    collection: CCECollection
    config: CCEConfig
    store: ShardedStore
    residents: ResidentRowStore | None
    """Of the rows of its residents, if it may have some."""


def tables_of(model: DistributedModelParallel, optimizer: KeyedOptimizer | None = None) -> list[ShardedTable]:
    """All CCE tables of a sharded model, with the state that `optimizer` has of them. Every rank calls it.

    Raises as `collections_of`.
    """
    with maps_cared_for():
        weights = model.state_dict()
    states = {} if optimizer is None else optimizer.state_dict()["state"]
    tables = []
    for path, collection in collections_of(model).items():
        for config in collection.cce_configs():
            name = joined(path, collection.weight_name(config.name))
            rows: ResidentRowStore | None = collection.quantized_store(config)
            if config.residents is not None and rows is None:
                row_name = joined(path, collection.residents_name(config))
                rows = ShardedStore(weights[row_name], _state_of(row_name, states))
            store = ShardedStore(weights[name], _state_of(name, states))
            tables.append(ShardedTable(collection=collection, config=config, store=store, residents=rows))
    return tables


def _state_of(weight: str, states: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """A combined optimizer puts the key that it was given for a part, if any, before the names of its weights."""
    keyed = (state for name, state in states.items() if name.endswith(f".{weight}"))
    return states[weight] if weight in states else next(keyed, {})


def check_on_all_ranks(model: DistributedModelParallel, tables: Mapping[str, TableSnapshot]) -> None:
    """Raise MapMismatchError on every rank unless `tables` can be restored on all of them."""
    collections = collections_of(model).values()
    theirs = {name for collection in collections for name in collection.cce_tables()}

    def check() -> None:
        if theirs != tables.keys():
            raise MapMismatchError(f"the maps are of tables {sorted(tables)}, the model has {sorted(theirs)}")
        for collection in collections:
            collection.check_tables({name: tables[name] for name in collection.cce_tables()})

    on_all_ranks(check)


class ShardedMaps:
    """The CCE tables of all collections in a `DistributedModelParallel` model. Every rank calls every method.

    Example:
        >>> registry.open().attach(ShardedMaps(model))  # doctest: +SKIP
    """

    def __init__(self, model: DistributedModelParallel) -> None:
        self._model = model

    def snapshot(
        self,
        reports: Mapping[str, TableReport] | None = None,
        frequencies: Mapping[str, npt.NDArray[np.int64]] | None = None,
    ) -> dict[str, TableSnapshot]:
        """As `CCECollection.snapshot`: whole tables, on every rank."""
        for collection in collections_of(self._model).values():
            collection.remap.check_weights()
        reports, frequencies = reports or {}, frequencies or {}
        return {
            config.name: snapshot_of(
                config,
                collection.pointer_map(config.name),
                weights=store.read().weights,
                frequencies=frequencies.get(config.name),
                report=reports.get(config.name),
            )
            for collection, config, store, _ in tables_of(self._model)
        }

    def restore(self, tables: Mapping[str, TableSnapshot]) -> None:
        """As `CCECollection.restore`. If it fails on any rank, it does on all, and nothing has changed."""
        check_on_all_ranks(self._model, tables)
        for collection, config, store, _ in tables_of(self._model):
            table = tables[config.name]
            if table.weights is not None:
                store.write(TableRows(weights=config.used_codewords(np.array(table.weights)), states={}))
            collection.attach_pointer_map(config.name, table.pointer_map)
