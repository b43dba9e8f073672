"""Reclustering in the middle of distributed training."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import numpy.typing as npt
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer

from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.config import CCEEmbeddingBagConfig
from torchrec_cce.errors import ConfigError
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.modules.embedding_bag import CCEEmbeddingBagCollection
from torchrec_cce.modules.recluster import TableReport, TableRows, recluster_rows
from torchrec_cce.sharding.agreement import on_first_rank
from torchrec_cce.sharding.store import ShardedStore

Result = tuple[PointerMap, TableRows, TableReport]


def collections_of(model: DistributedModelParallel) -> dict[str, CCEEmbeddingBagCollection]:
    """The CCE collections of a sharded model, by the path that their parameters' names start with."""
    return {
        path: module for path, module in model.module.named_modules() if isinstance(module, CCEEmbeddingBagCollection)
    }


def recluster_sharded(
    model: DistributedModelParallel,
    optimizer: KeyedOptimizer,
    *,
    seed: int,
    frequencies: Mapping[str, npt.NDArray[np.integer]] | None = None,
    settings: ReclusterConfig | None = None,
) -> dict[str, TableReport]:
    """`CCEEmbeddingBagCollection.recluster` for a sharded model: the same arguments, policy and bits.

    Every rank calls it between two steps, with no batch in flight. Rank 0 computes; weights, optimizer state and maps
    then change on all ranks, or, if the clustering fails, the error is raised on all and nothing has changed.

    Raises:
        ClusteringError: a table holds NaN or infinite values.
        ConfigError: `frequencies` of an unknown table or of a wrong length.
    """
    settings = settings or ReclusterConfig()
    frequencies = frequencies or {}
    collections = collections_of(model)
    unknown = set(frequencies) - {table for collection in collections.values() for table in collection.cce_tables()}
    if unknown:
        raise ConfigError(f"frequencies of {sorted(unknown)}, which are not CCE tables of this model")
    weights, states = model.state_dict(), optimizer.state_dict()["state"]
    stores: dict[tuple[str, str], ShardedStore] = {}
    results: dict[tuple[str, str], Result] = {}
    for path, collection in collections.items():
        for table in collection.embedding_bag_configs():
            if not isinstance(table, CCEEmbeddingBagConfig):
                continue
            name = f"{path}.ebc.embedding_bags.{table.name}.weight"
            store = ShardedStore(weights[name], states.get(name, {}))
            rows = store.read()
            stores[path, table.name] = store
            results[path, table.name] = on_first_rank(
                partial(
                    recluster_rows,
                    table,
                    collection.pointer_map(table.name),
                    rows,
                    seed=seed,
                    frequencies=frequencies.get(table.name),
                    settings=settings,
                )
            )
    for (path, name), (new_map, rows, _) in results.items():
        stores[path, name].write(rows)
        collections[path].attach_pointer_map(name, new_map)
    return {name: report for (_, name), (_, _, report) in results.items()}
