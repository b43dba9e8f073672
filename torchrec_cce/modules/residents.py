"""The next phase of a table's residents, wherever its rows live."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.admission import admitted_ages, fresh_rows
from torchrec_cce.hashing import derive_seed
from torchrec_cce.maps.residency import Residency
from torchrec_cce.methods.cce import CCEConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class Phase:
    """A phase that is to begin."""

    config: CCEConfig
    before: Residency
    residency: Residency
    """Of the phase, open."""
    seed: int

    def rows(self) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """What the rows start from, a part at a time with its first row."""
        return fresh_rows(self.before, self.residency, self.config.embedding_dim, seed=self.seed)


def next_phase(
    config: CCEConfig,
    before: Residency,
    *,
    frequencies: npt.NDArray[np.integer] | None,
    seed: int,
    num_threads: int,
    out: npt.NDArray[np.uint8] | None = None,
) -> Phase:
    """Choose who is admitted. Arguments and errors as of `admitted_ages`, which get the table's own seed."""
    assert config.residents is not None
    seed = derive_seed(seed, config.name)
    ages = admitted_ages(
        before,
        config.residents.num_rows(config.num_embeddings),
        frequencies=frequencies,
        seed=seed,
        num_threads=num_threads,
        out=out,
    )
    after = Residency(ages=ages, phases=before.phases + 1, is_open=True)
    return Phase(config=config, before=before, residency=after, seed=seed)
