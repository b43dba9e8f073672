"""Rows for IDs in the middle of distributed training: the next phase of residents, and those who arrive in it."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer

from torchrec_cce.errors import ConfigError
from torchrec_cce.modules.residents import residency_of_phase, rows_of_phase
from torchrec_cce.sharding.host_file import in_a_file
from torchrec_cce.sharding.recluster import check_names
from torchrec_cce.sharding.tables import ShardedTable, tables_of


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
    tables = _tables_with_residents(model, optimizer, frequencies or {})
    for table in tables:
        table.collection.check_no_phase_is_open()
    _give_rows(tables, seed, frequencies or {})


def top_up_sharded(
    model: DistributedModelParallel, *, seed: int, frequencies: Mapping[str, npt.NDArray[np.integer]]
) -> None:
    """`CCECollection.top_up` for a sharded model: the same arguments, choice and rows.

    Every rank calls it, as `admit_sharded`, with the same frequencies: those of `ShardedFrequencies.totals`.

    Raises:
        ConfigError: no table has residents, or no phase is open; what `admitted_ages` raises.
        OSError: the cache folder (`TORCHREC_CCE_CACHE`) has no room for the ages.
    """
    tables = _tables_with_residents(model, None, frequencies)
    for table in tables:
        table.collection.check_a_phase_is_open()
    tables = [table for table in tables if table.config.name in frequencies]
    free = [table for table in tables if table.collection.remap.free_rows(table.config.name)]
    _give_rows(free, seed, frequencies)


def _tables_with_residents(
    model: DistributedModelParallel, optimizer: KeyedOptimizer | None, frequencies: Mapping[str, object]
) -> list[ShardedTable]:
    tables = tables_of(model, optimizer)
    check_names(frequencies, tables)
    found = [table for table in tables if table.residents is not None]
    if not found:
        raise ConfigError("no table has residents; give its config residents=ResidentConfig(…)")
    return found


def _give_rows(tables: Sequence[ShardedTable], seed: int, frequencies: Mapping[str, npt.NDArray[np.integer]]) -> None:
    given = []
    for collection, config, store, rows in tables:
        assert rows is not None
        before, counted = collection.remap.residency(config.name), frequencies.get(config.name)
        after = residency_of_phase(config, before, frequencies=counted, seed=seed, make=in_a_file)
        pointer_map, weights = collection.pointer_map(config.name), store.read().weights
        fresh = rows_of_phase(config, pointer_map, weights, before, after, seed=seed)
        given.append((collection.remap, config.name, rows.fill if before.is_open else rows.restart, fresh, after))
    for remap, name, write, fresh, after in given:
        write(fresh)
        remap.attach_residency(name, after)
