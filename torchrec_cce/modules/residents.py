"""What the rows of a table's residents start from, wherever the table lives."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.admission import fresh_rows
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.residency import Residency
from torchrec_cce.methods.cce import CCEConfig


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
        seed=seed,
        shrinkage=config.residents.shrinkage,
        embed=lambda positions: config.embed(weights, pointer_map.codebook_codes(positions)),
    )
