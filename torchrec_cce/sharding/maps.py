"""Maps and weights of a sharded model, to be published from and attached to all ranks together."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer

from torchrec_cce.config import CCEConfig
from torchrec_cce.errors import ConfigError, MapMismatchError
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.modules.collection import CCECollection
from torchrec_cce.modules.recluster import TableReport, TableRows
from torchrec_cce.modules.remap import Remap
from torchrec_cce.modules.snapshot import snapshot_of
from torchrec_cce.sharding.agreement import on_all_ranks
from torchrec_cce.sharding.store import ShardedStore


def collections_of(model: DistributedModelParallel) -> dict[str, CCECollection]:
    """The CCE collections of a sharded model, by the path that their parameters' names start with.

    Raises:
        ConfigError: a training pipeline has batches in flight that were remapped by the maps there are.
    """
    found = {path: module for path, module in model.module.named_modules() if isinstance(module, CCECollection)}
    for path, collection in found.items():
        if not isinstance(collection.remap, Remap):
            raise ConfigError(
                f"{path!r} is in a training pipeline that has batches in flight; call "
                "torchrec_cce.sharding.pipeline.drain first"
            )
    return found


class ShardedTable(NamedTuple):
    """A CCE table of a sharded model."""

    collection: CCECollection
    config: CCEConfig
    store: ShardedStore


def tables_of(model: DistributedModelParallel, optimizer: KeyedOptimizer | None = None) -> list[ShardedTable]:
    """All CCE tables of a sharded model, with the state that `optimizer` has of them. Every rank calls it.

    Raises as `collections_of`.
    """
    weights = model.state_dict()
    states = {} if optimizer is None else optimizer.state_dict()["state"]
    tables = []
    for path, collection in collections_of(model).items():
        for config in collection.cce_configs():
            name = f"{path}.{collection.weight_name(config.name)}"
            store = ShardedStore(weights[name], states.get(name, {}))
            tables.append(ShardedTable(collection=collection, config=config, store=store))
    return tables


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
        reports, frequencies = reports or {}, frequencies or {}
        return {
            config.name: snapshot_of(
                config,
                collection.pointer_map(config.name),
                weights=store.read().weights,
                frequencies=frequencies.get(config.name),
                report=reports.get(config.name),
            )
            for collection, config, store in tables_of(self._model)
        }

    def restore(self, tables: Mapping[str, TableSnapshot]) -> None:
        """As `CCECollection.restore`. If it fails on any rank, it does on all, and nothing has changed."""
        check_on_all_ranks(self._model, tables)
        for collection, config, store in tables_of(self._model):
            table = tables[config.name]
            if table.weights is not None:
                store.write(TableRows(weights=config.used_words(np.array(table.weights)), states={}))
            collection.attach_pointer_map(config.name, table.pointer_map)
