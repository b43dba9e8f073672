"""The next phase of residents in the middle of distributed training."""

from collections.abc import Mapping
from functools import partial

import numpy as np
import numpy.typing as npt
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer

from torchrec_cce.errors import ConfigError
from torchrec_cce.modules.residents import ages_of_phase, rows_of_phase
from torchrec_cce.sharding.host_file import HostFile
from torchrec_cce.sharding.recluster import check_names
from torchrec_cce.sharding.tables import tables_of


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
    with_residents = [table for table in tables if table.residents is not None]
    if not with_residents:
        raise ConfigError("no table has residents; give its config residents=ResidentConfig(…)")
    for collection, *_ in with_residents:
        collection.check_no_phase_is_open()
    phases = []
    for collection, config, store, rows in with_residents:
        assert rows is not None
        before, counted = collection.remap.residency(config.name), (frequencies or {}).get(config.name)
        choose = partial(ages_of_phase, config, before, frequencies=counted, seed=seed)
        file = HostFile((before.num_ids, 1), np.dtype(np.uint8))
        ages = file.filled(lambda out: choose(out=out[:, 0]))[:, 0]  # noqa: B023  called in this round
        after = before.next_phase(ages)
        pointer_map, weights = collection.pointer_map(config.name), store.read().weights
        fresh = rows_of_phase(config, pointer_map, weights, before, after, seed=seed)
        phases.append((collection.remap, config.name, rows, fresh, after))
    for remap, name, rows, fresh, after in phases:
        rows.restart(fresh)
        remap.attach_residency(name, after)
