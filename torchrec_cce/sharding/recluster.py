"""Reclustering in the middle of distributed training, its work spread over the ranks."""

import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer

from torchrec_cce.clustering.column import PAIR, TrainedColumn, sum_errors
from torchrec_cce.clustering.entropy import pointer_entropies
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.clustering.table import ClusteredTable
from torchrec_cce.errors import ConfigError
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.modules.collection import CCECollection
from torchrec_cce.modules.recluster import TableReport, TableTask, report_of
from torchrec_cce.sharding.agreement import from_all_ranks, on_all_ranks
from torchrec_cce.sharding.host_file import HostFile, share_keys
from torchrec_cce.sharding.tables import ShardedStore, ShardedTable, tables_of


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A table to cluster, and where the result goes."""

    collection: CCECollection
    store: ShardedStore
    task: TableTask


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
    started = time.perf_counter()
    jobs = _jobs(model, optimizer, seed, frequencies or {}, settings or ReclusterConfig())
    share_keys(job.task.pointer_map for job in jobs)
    on_all_ranks(lambda: [job.task.clustering for job in jobs])
    trained = _train(jobs)
    files = [HostFile((c.num_ids, c.num_columns), c.pointer_dtype) for c in (job.task.clustering for job in jobs)]
    done = [_assign(job.task, columns, file) for job, columns, file in zip(jobs, trained, files, strict=True)]
    new_maps = [
        job.task.pointer_map.clustered(file.everything(), job.task.helper_hash)
        for job, file in zip(jobs, files, strict=True)
    ]
    facts = _facts(new_maps)
    reports = {}
    for job, columns, tables, new_map, (digest, entropies) in zip(jobs, trained, done, new_maps, facts, strict=True):
        name = job.task.config.name
        job.store.write(job.task.new_rows(tables))
        job.collection.attach_pointer_map(name, new_map.vouched(digest))
        reports[name] = report_of(
            new_map,
            tables,
            sample_errors=sum_errors(columns),
            entropies=entropies,
            seconds=time.perf_counter() - started,
        )
    return reports


def _jobs(
    model: DistributedModelParallel,
    optimizer: KeyedOptimizer,
    seed: int,
    frequencies: Mapping[str, npt.NDArray[np.integer]],
    settings: ReclusterConfig,
) -> list[_Job]:
    """All CCE tables of the model, read from their shards."""
    tables = tables_of(model, optimizer)
    check_names(frequencies, tables)
    settings = for_each_rank(settings)
    return [
        _Job(
            collection=collection,
            store=store,
            task=TableTask(
                config=config,
                pointer_map=collection.pointer_map(config.name),
                rows=store.read(),
                seed=seed,
                frequencies=frequencies.get(config.name),
                settings=settings,
            ),
        )
        for collection, config, store in tables
    ]


def check_names(frequencies: Collection[str], tables: Sequence[ShardedTable]) -> None:
    """Raise ConfigError unless `frequencies` are those of some of `tables`."""
    unknown = set(frequencies) - {table.config.name for table in tables}
    if unknown:
        raise ConfigError(f"frequencies of {sorted(unknown)}, which are not CCE tables of this model")


def for_each_rank(settings: ReclusterConfig) -> ReclusterConfig:
    """What a rank may do where `settings` are for its host."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    return replace(settings, num_threads=max(1, settings.num_threads // ranks_here))


def _train(jobs: Sequence[_Job]) -> list[list[TrainedColumn]]:
    """Every column of every table, on every rank."""
    clusterings = [job.task.clustering for job in jobs]
    columns = [(t, column) for t, clustering in enumerate(clusterings) for column in range(clustering.num_columns)]
    mine = _balanced(columns, [clusterings[t].training_cost for t, _ in columns], dist.get_world_size())[
        dist.get_rank()
    ]

    def train() -> dict[tuple[int, int], TrainedColumn]:
        trained = {}
        for t, group in groupby(mine, itemgetter(0)):
            its_columns = [column for _, column in group]
            with jobs[t].task.named_errors():
                found = clusterings[t].train(its_columns)
            trained.update({(t, column): one for column, one in zip(its_columns, found, strict=True)})
        return trained

    together = from_all_ranks(train)
    return [[together[t, column] for column in range(c.num_columns)] for t, c in enumerate(clusterings)]


def _balanced(columns: list[tuple[int, int]], costs: list[int], num_workers: int) -> list[list[tuple[int, int]]]:
    """Columns for each worker, in order: the most expensive first, each to whoever has the least to do."""
    shares: list[list[tuple[int, int]]] = [[] for _ in range(num_workers)]
    loads = [0] * num_workers
    for cost, column in sorted(zip(costs, columns, strict=True), key=lambda pair: (-pair[0], pair[1])):
        worker = loads.index(min(loads))
        shares[worker].append(column)
        loads[worker] += cost
    return [sorted(share) for share in shares]


def _assign(task: TableTask, trained: Sequence[TrainedColumn], file: HostFile[np.unsignedinteger]) -> ClusteredTable:
    """Write this rank's share of the pointers; the new tables from the sums over all ranks."""
    start, stop, share = file.mine()
    centroids = [column.centroids for column in trained]
    pairs = _nearest_pairs(task, centroids)

    def assign() -> npt.NDArray[np.int64]:
        with task.named_errors():
            return task.clustering.assign(centroids, start, stop, share, pairs)

    totals = torch.from_numpy(on_all_ranks(assign))
    dist.all_reduce(totals)  # of integers: exact, in any order
    return task.clustering.finish(centroids, totals.numpy())


def _nearest_pairs(task: TableTask, centroids: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.void] | None:
    """The answers for all embeddings of a table that has more IDs than those, each rank finding its share."""
    num_pairs = task.clustering.num_pairs
    if not num_pairs:
        return None
    file = HostFile((num_pairs, 1), np.dtype(np.uint64))
    start, stop, share = file.mine()

    def find() -> None:
        with task.named_errors():
            task.clustering.nearest_pairs(centroids, start, stop, share.reshape(-1).view(PAIR))

    on_all_ranks(find)
    return file.everything().reshape(-1).view(PAIR)


def _facts(maps: Sequence[PointerMap]) -> list[tuple[str, tuple[float, ...]]]:
    """Digest and entropies of each map: a pass over all its pointers, which one rank makes for all."""
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def mine() -> dict[int, tuple[str, tuple[float, ...]]]:
        return {
            t: (one.digest, pointer_entropies(one.stored_view, one.num_rows))
            for t, one in enumerate(maps)
            if t % world_size == rank
        }

    together = from_all_ranks(mine)
    return [together[t] for t in range(len(maps))]
