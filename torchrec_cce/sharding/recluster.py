"""Reclustering in the middle of distributed training, its work spread over the ranks."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer

from torchrec_cce.clustering.admission import admitted_ages
from torchrec_cce.clustering.fold import ResidentRows
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.clustering.task import recluster_maps
from torchrec_cce.errors import ConfigError
from torchrec_cce.hashing import derive_seed
from torchrec_cce.modules.recluster import TableReport, physical_rows, table_task
from torchrec_cce.modules.residents import rows_of_phase
from torchrec_cce.sharding.agreement import on_all_ranks
from torchrec_cce.sharding.executor import RankExecutor
from torchrec_cce.sharding.host_file import HostFile, share_keys
from torchrec_cce.sharding.tables import ShardedTable, tables_of


def recluster_sharded(
    model: DistributedModelParallel,
    optimizer: KeyedOptimizer,
    *,
    seed: int,
    frequencies: Mapping[str, npt.NDArray[np.integer]] | None = None,
    settings: ReclusterConfig | None = None,
) -> dict[str, TableReport]:
    """`CCECollection.recluster` for a sharded model: the same arguments, policy and bits.

    Every rank calls it between two steps, with no batch in flight. Columns are trained on the ranks in parallel,
    balanced by their cost, and each rank assigns an equal share of the IDs of every table. The maps are written to and
    mapped from one file a host; beyond it a rank holds the physical tables and chunks. Weights, optimizer state and
    maps then change on all ranks; or, if anything fails on any, the error is raised on all and nothing has changed.

    Args:
        settings: `num_threads` is for each host: its ranks share them.

    Raises:
        ClusteringError: a table holds NaN or infinite values.
        ConfigError: `frequencies` of an unknown table or of a wrong length.
        OSError: the cache folder (`TORCHREC_CCE_CACHE`) has no room for the new maps.
    """
    tables = tables_of(model, optimizer)
    check_names(frequencies or {}, tables)
    settings = for_each_rank(settings or ReclusterConfig())
    rows = {table.config.name: table.store.read() for table in tables}
    residents = {table.config.name: _resident_rows(table) for table in tables}
    share_keys(collection.pointer_map(config.name) for collection, config, *_ in tables)
    tasks = on_all_ranks(
        lambda: [
            table_task(
                config,
                collection.pointer_map(config.name),
                rows[config.name],
                seed=seed,
                frequencies=(frequencies or {}).get(config.name),
                settings=settings,
                residents=residents[config.name],
            )
            for collection, config, *_ in tables
        ]
    )
    done = recluster_maps(tasks, RankExecutor(lambda: {task.table: task.clustering for task in tasks}))
    for collection, config, store, _ in tables:
        new_map, table = done[config.name]
        store.write(physical_rows(table))
        collection.attach_pointer_map(config.name, new_map)
    return {name: TableReport.of_clustering(new_map, table) for name, (new_map, table) in done.items()}


def admit_sharded(
    model: DistributedModelParallel,
    optimizer: KeyedOptimizer,
    *,
    seed: int,
    frequencies: Mapping[str, npt.NDArray[np.integer]] | None = None,
) -> None:
    """`CCECollection.admit` for a sharded model: the same arguments, choice and rows.

    Every rank calls it between two steps, with no batch in flight. The ages of IDs are one file of each host. If
    anything fails on any rank, the error is raised on all, and nothing has changed.

    Raises:
        ConfigError: no table has residents, or a phase is open already; what `admitted_ages` raises.
        OSError: the cache folder (`TORCHREC_CCE_CACHE`) has no room for the ages.
    """
    tables = tables_of(model, optimizer)
    check_names(frequencies or {}, tables)
    for collection in {table.collection for table in tables}:
        collection.check_no_phase_is_open()
    phases = []
    for collection, config, store, rows in tables:
        if rows is None:
            continue
        before, seed_of_table = collection.remap.residency(config.name), derive_seed(seed, config.name)
        choose = partial(
            admitted_ages,
            before,
            config.max_residents,
            frequencies=(frequencies or {}).get(config.name),
            seed=seed_of_table,
            num_threads=os.cpu_count() or 1,
        )
        file = HostFile((before.num_ids, 1), np.dtype(np.uint8))
        ages = file.filled(lambda out: choose(out=out[:, 0]))[:, 0]  # noqa: B023  called in this round
        after = before.next_phase(ages)
        pointer_map, weights = collection.pointer_map(config.name), store.read().weights
        fresh = rows_of_phase(config, pointer_map, weights, before, after, seed=seed_of_table)
        phases.append((collection.remap, config.name, rows, fresh, after))
    for remap, name, rows, fresh, after in phases:
        rows.restart(fresh)
        remap.attach_residency(name, after)


def _resident_rows(table: ShardedTable) -> ResidentRows | None:
    """What is to be folded, if a phase of a table is open: one file of each host."""
    if table.residents is None:
        return None
    residency = table.collection.remap.residency(table.config.name)
    return ResidentRows(residency=residency, rows=table.residents.read_rows()) if residency.is_open else None


def check_names(frequencies: Collection[str], tables: Sequence[ShardedTable]) -> None:
    """Raise ConfigError unless `frequencies` are those of some of `tables`."""
    unknown = set(frequencies) - {table.config.name for table in tables}
    if unknown:
        raise ConfigError(f"frequencies of {sorted(unknown)}, which are not CCE tables of this model")


def for_each_rank(settings: ReclusterConfig) -> ReclusterConfig:
    """What a rank may do where `settings` are for its host."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    return replace(settings, num_threads=max(1, settings.num_threads // ranks_here))
