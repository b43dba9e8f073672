"""Rows for IDs in the middle of distributed training: the next phase of residents, and those who arrive in it."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer

from torchrec_cce.errors import ConfigError
from torchrec_cce.methods.residents import NO_RESIDENTS
from torchrec_cce.modules.recluster import check_names
from torchrec_cce.modules.residents import rows_given
from torchrec_cce.sharding.host_file import in_a_file
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
    check_names(frequencies, [table.config.name for table in tables])
    found = [table for table in tables if table.residents is not None]
    if not found:
        raise ConfigError(NO_RESIDENTS)
    return found


def _give_rows(tables: Sequence[ShardedTable], seed: int, frequencies: Mapping[str, npt.NDArray[np.integer]]) -> None:
    given = []
    for collection, config, store, rows in tables:
        assert rows is not None
        residency, write_rows = rows_given(
            config,
            collection.pointer_map(config.name),
            store.read().weights,
            collection.remap.residency(config.name),
            rows,
            frequencies=frequencies.get(config.name),
            seed=seed,
            make=in_a_file,
        )
        given.append((collection.remap, config.name, residency, write_rows))
    for remap, name, residency, write_rows in given:
        write_rows()
        remap.attach_residency(name, residency)
