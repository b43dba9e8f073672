"""Clustering all tables of a model by the workers of an engine, in memory that does not grow with the number of IDs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.clustering.task import TableTask, recluster_maps
from torchrec_cce.errors import ConfigError
from torchrec_cce.jobs.recluster.executor import EngineExecutor, Progress, StageTime
from torchrec_cce.jobs.recluster.memory_plan import memory_plan
from torchrec_cce.jobs.recluster.source import BundleMap, RegistryMap, StoredTable
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.methods.cce import CCEConfig
from torchrec_cce.modules.recluster import TableReport, TableRows, physical_rows, table_task
from torchrec_cce.workers.engine import Engine


@dataclass(frozen=True, kw_only=True, eq=False)
class TableSource:
    """One table to cluster."""

    config: CCEConfig
    rows: TableRows
    """The physical table and its optimizer's states, in this process's memory; workers get them from it."""
    maps: BundleMap | RegistryMap
    """Where every worker finds the table's map."""
    map_digest: str
    """Of the map that the table was trained with: another one ends the job."""
    frequencies: Path | Literal["snapshot"] | None = None
    """How often the ID of each position was seen: a `.npy` file of [n] numbers that every worker sees; the frequencies
    that lie beside the map; or None to let every ID count once."""

    @property
    def stored(self) -> StoredTable:
        return StoredTable(
            table=self.config.name, maps=self.maps, map_digest=self.map_digest, frequencies=self.frequencies
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Clustered:
    """A table after its clustering, in the process that started the job. Nothing was changed or published yet."""

    pointer_map: PointerMap
    """The new map, its digest known. Its pointers are a memory-mapped file without a name, which is gone with them."""
    rows: TableRows
    """The new physical table and optimizer states, in the shapes of the source's."""
    report: TableReport
    """Its `seconds` are those from the start of the job to the end of the table."""
    cluster_sizes: npt.NDArray[np.int64]
    """[c, k]: how many IDs each codebook row has."""
    times: Mapping[str, StageTime]
    """Of `"sampling"`, `"k-means"`, `"pairs"` (only with more IDs than embeddings), `"assignment"` and `"digest"`."""


def cluster(
    sources: Sequence[TableSource],
    engine: Engine,
    *,
    seed: int,
    settings: ReclusterConfig,
    memory_bytes: int,
    work_dir: Path,
    progress: Progress | None = None,
) -> dict[str, Clustered]:
    """Cluster tables: the bits of `recluster_rows`, whatever the engine, the workers and the memory.

    The columns of all tables are trained in parallel, then the possible embeddings of each table that has more IDs than
    those are assigned in parallel, then the IDs in ranges. Nothing is written but files without a name in `work_dir`,
    which has room for the new maps or the job ends before it begins, and what the engine shares.

    Args:
        sources: tables of different names.
        engine: entered.
        seed: as for `recluster_rows`.
        settings: `num_threads` is the engine's workers, and `chunk_size` is lowered where memory is short.
        memory_bytes: for this process and all workers together, of what no file backs.
        work_dir: on a disk with room for the new maps and the tables of pairs.
        progress: called in this thread.

    Returns:
        table name → what became of it.

    Raises:
        ConfigError: `memory_bytes` is too small; the message names the least that is enough.
        ClusteringError: NaN or infinite weights; names the table.
        MapMismatchError: a map is not the one that a source says.
        JobError: a worker vanished. Nothing is left behind.
        OSError: `work_dir` or the engine's folder has no room.
    """
    names = [source.config.name for source in sources]
    if len(set(names)) < len(names):
        raise ConfigError(f"tables {sorted(names)} are not all of different names")
    tasks = table_tasks(sources, seed, settings)
    executor = EngineExecutor(
        tasks,
        {source.config.name: source.stored for source in sources},
        engine,
        plan=memory_plan(tasks, engine.num_workers, memory_bytes),
        work_dir=work_dir,
        progress=progress or (lambda _stage, _share: None),
    )
    return {
        name: Clustered(
            pointer_map=new_map,
            rows=physical_rows(done),
            report=TableReport.of_clustering(new_map, done),
            cluster_sizes=done.cluster_sizes,
            times=executor.times(name),
        )
        for name, (new_map, done) in recluster_maps(tasks, executor).items()
    }


def table_tasks(sources: Sequence[TableSource], seed: int, settings: ReclusterConfig) -> list[TableTask]:
    """The tables opened and checked in this process. Raises what `cluster` raises before its workers begin."""
    opened = {maps: maps.open() for maps in {source.maps for source in sources}}
    tasks = []
    for source in sources:
        pointer_map, frequencies = source.stored.find(opened[source.maps])
        task = table_task(
            source.config, pointer_map, source.rows, seed=seed, frequencies=frequencies, settings=settings
        )
        _ = task.clustering
        tasks.append(task)
    return tasks
