"""The next phase of a table's residents, wherever the table lives: who is admitted, and what their rows start from."""

import os
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.admission import admitted_ages, fresh_rows
from torchrec_cce.hashing import derive_seed
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.residency import Residency
from torchrec_cce.methods.cce import CCEConfig


def ages_of_phase(
    config: CCEConfig,
    before: Residency,
    *,
    frequencies: npt.NDArray[np.integer] | None,
    seed: int,
    out: npt.NDArray[np.uint8] | None = None,
) -> npt.NDArray[np.uint8]:
    """The ages once the phase after `before` has begun, chosen by all cores; see `admitted_ages`.

    Args:
        seed: of all tables, as that of `rows_of_phase`.
    """
    return admitted_ages(
        before,
        config.max_residents,
        frequencies=frequencies,
        seed=derive_seed(seed, config.name),
        num_threads=os.cpu_count() or 1,
        out=out,
    )


def rows_of_phase(
    config: CCEConfig,
    pointer_map: PointerMap,
    weights: npt.NDArray[np.float32],
    before: Residency,
    after: Residency,
    *,
    seed: int,
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """The rows of the phase `after`, which follows `before`; see `fresh_rows`.

    Args:
        weights: [2·c·k, d/c], the codewords.
    """
    assert config.residents is not None
    return fresh_rows(
        before,
        after,
        seed=derive_seed(seed, config.name),
        shrinkage=config.residents.shrinkage,
        embed=lambda positions: config.embed(weights, pointer_map.codebook_codes(positions)),
    )
