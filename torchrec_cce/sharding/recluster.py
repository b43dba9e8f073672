"""New maps in the middle of distributed training, the work spread over the ranks: a clustering, or others' maps."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer

from torchrec_cce.clustering.adopt import Given, adopt_tables
from torchrec_cce.clustering.executor import Clustering
from torchrec_cce.clustering.fold import ResidentRows
from torchrec_cce.clustering.resident_adoption import ResidentAdoption
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.clustering.table import ClusteredTable
from torchrec_cce.clustering.task import TableTask, recluster_maps
from torchrec_cce.errors import MapMismatchError
from torchrec_cce.maps.renumbering import Renumbering
from torchrec_cce.maps.residency import Residency
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.methods.cce import CCEConfig
from torchrec_cce.modules.recluster import TableReport, check_names, physical_rows, table_task
from torchrec_cce.modules.residents import carried_over
from torchrec_cce.sharding.agreement import from_each_rank, on_all_ranks
from torchrec_cce.sharding.executor import RankExecutor
from torchrec_cce.sharding.host_file import HostFile, in_a_file, share_keys
from torchrec_cce.sharding.tables import ShardedTable, check_on_all_ranks, tables_of


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
    found = tables_of(model, optimizer)
    tasks = _tasks(found, seed=seed, frequencies=frequencies or {}, settings=settings or ReclusterConfig())
    share_keys(task.pointer_map for task in tasks)
    done = recluster_maps(tasks, RankExecutor(lambda: {task.table: task.clustering for task in tasks}))
    for collection, config, store, _ in found:
        new_map, table = done[config.name]
        store.write(physical_rows(table))
        collection.attach_pointer_map(config.name, new_map)
    return {name: TableReport.of_clustering(new_map, table) for name, (new_map, table) in done.items()}


def adopt_sharded(
    model: DistributedModelParallel,
    optimizer: KeyedOptimizer,
    tables: Mapping[str, TableSnapshot],
    *,
    frequencies: Mapping[str, npt.NDArray[np.integer]] | None = None,
    settings: ReclusterConfig | None = None,
) -> dict[str, TableReport]:
    """Replace the maps of all CCE tables by those of `tables`, and nothing that the model has learned since.

    Every codebook row becomes the mean, over the IDs that now point at it, of the embeddings that they have in the
    model at this moment, so that a map may have been clustered from weights of an hour ago. A row that no ID points at
    gets the codeword that it has in `tables`. Helper rows and the optimizer's state are made as by a clustering. An ID
    that the old map did not know enters with the embedding that the old map's `unseen` gave it; where that was an
    error, with hashed codewords, as by `PointerMap.with_vocabulary`.

    Residents keep their rows, the optimizer's state of these, and their embeddings: a row becomes what it is beyond the
    new codewords, and the phase goes on. Int8 rows are rounded anew. The ages of IDs stay with their raw IDs.

    Every rank calls it between two steps, with no batch in flight, and takes an equal share of the IDs; the bits do not
    depend on how many ranks there are. If it fails on any rank, it does on all, and nothing has changed.

    Args:
        tables: of an opened version, the same on every rank. Without weights, rows that no ID points at become zero.
        frequencies: table → [num_ids] counts, one a position of the new map; the objective weighs IDs by them.
        settings: `helper_init`, `chunk_size` and `num_threads`; the latter for each host, whose ranks share them.

    Returns:
        One report a CCE table. Its entropies are those that came with the map.

    Raises:
        MapMismatchError: `tables` are of other CCE tables or sizes than the model's, or not the same on every rank.
        ClusteringError: the model or `tables` hold NaN or infinite values.
        ConfigError: `frequencies` of an unknown table or of a wrong length.
    """
    started = time.perf_counter()
    check_on_all_ranks(model, tables)
    _check_same_on_all_ranks(tables)
    found = tables_of(model, optimizer)
    # Nothing is drawn: any seed does.
    tasks = _tasks(found, seed=0, frequencies=frequencies or {}, settings=settings or ReclusterConfig())
    share_keys(tables[task.table].pointer_map for task in tasks)
    given = {config.name: _given(config, tables[config.name]) for _, config, *_ in found}
    residencies = {table.config.name: _carried_over(table, tables) for table in found if table.residents is not None}

    def adoption(task: TableTask) -> Clustering:
        new_map = tables[task.table].pointer_map
        if task.residents is None:
            return task.inputs.adoption(task.pointer_map, new_map, task.frequencies)
        residents = replace(task.residents, residency=residencies[task.table])
        return task.inputs.adoption_in_a_phase(task.pointer_map, new_map, residents, given[task.table].codebook)

    executor = RankExecutor(lambda: {task.table: adoption(task) for task in tasks})
    done = adopt_tables(executor, given)
    rows = {
        task.table: _rows_left(executor.tables[task.table], task.residents, done[task.table], given[task.table])
        for task in tasks
        if task.residents is not None
    }
    reports = {}
    for collection, config, store, residents in found:
        new_map, table = tables[config.name].pointer_map, done[config.name]
        store.write(physical_rows(table))
        collection.remap.attach_pointer_map(config.name, new_map, residencies.get(config.name))
        if residents is not None and config.name in rows:
            residents.rewrite(rows[config.name])
        reports[config.name] = TableReport(
            generation=new_map.generation,
            entropies=tables[config.name].entropies,
            share_changed=table.share_changed,
            objective=table.objective,
            sample_errors=None,
            seconds=time.perf_counter() - started,
        )
    return reports


def _tasks(
    tables: Sequence[ShardedTable],
    *,
    seed: int,
    frequencies: Mapping[str, npt.NDArray[np.integer]],
    settings: ReclusterConfig,
) -> list[TableTask]:
    """Tables as they are now, on every rank the same. A rank may use its part of the threads that its host has."""
    check_names(frequencies, [table.config.name for table in tables])
    for table in tables:
        table.collection.remap.check_weights()
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    settings = replace(settings, num_threads=max(1, settings.num_threads // ranks_here))
    rows = {table.config.name: table.store.read() for table in tables}
    residents = {table.config.name: _resident_rows(table) for table in tables}
    return on_all_ranks(
        lambda: [
            table_task(
                config,
                collection.pointer_map(config.name),
                rows[config.name],
                seed=seed,
                frequencies=frequencies.get(config.name),
                settings=settings,
                residents=residents[config.name],
            )
            for collection, config, *_ in tables
        ]
    )


def _resident_rows(table: ShardedTable) -> ResidentRows | None:
    """What is to be folded, if a phase of a table is open: one file of each host."""
    if table.residents is None:
        return None
    residency = table.collection.remap.residency(table.config.name)
    return table.residents.learned(residency) if residency.is_open else None


def _carried_over(table: ShardedTable, tables: Mapping[str, TableSnapshot]) -> Residency:
    """The residency of a table by the positions of the map that it adopts."""
    name, collection = table.config.name, table.collection
    renumbering = Renumbering(old=collection.pointer_map(name), new=tables[name].pointer_map)
    return carried_over(collection.remap.residency(name), renumbering, make=in_a_file)


def _rows_left(
    clustering: Clustering, residents: ResidentRows, done: ClusteredTable, given: Given
) -> npt.NDArray[np.float32]:
    """What the rows of residents are after an adoption: one file of each host."""
    assert isinstance(clustering, ResidentAdoption)
    num_rows, width = residents.rows.shape
    file = HostFile((num_rows, width), np.dtype(np.float32))
    return file.filled(lambda out: clustering.rows_left(done.weights[:, 0], given.pointers, out))


def _given(config: CCEConfig, table: TableSnapshot) -> Given:
    """The clusters of `table`, and the codebook that came with its map."""
    shape = (config.num_columns, 2, config.num_rows, -1)
    width = config.embedding_dim // config.num_columns
    weights = np.zeros((2 * config.num_columns * config.num_rows, width), np.float32)
    if table.weights is not None:
        weights = table.weights
    return Given(
        pointers=lambda positions: table.pointer_map.codebook_codes(positions).astype(np.int64).T,
        codebook=weights.reshape(shape)[:, 0],
    )


def _check_same_on_all_ranks(tables: Mapping[str, TableSnapshot]) -> None:
    everyones = from_each_rank({name: table.pointer_map.digest for name, table in tables.items()})
    for name, digest in everyones[0].items():
        others = {theirs[name] for theirs in everyones} - {digest}
        if others:
            shown = sorted(other[:12] for other in others)
            raise MapMismatchError(
                f"table {name!r}: rank 0 was given the map {digest[:12]}, others {shown}; "
                "let one rank choose the version for all"
            )
