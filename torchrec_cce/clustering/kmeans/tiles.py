"""Sixteen vectors side by side, so that a register holds one coordinate of all of them."""

from typing import Any

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.kmeans.simd import LANES, add_square, aligned, bits, load, spread
from torchrec_cce.jit import jit


def pack_tiles(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """`vectors: [k, d] float32` as flat tiles [k / 16, d, 16]; the last is filled up with infinite ones."""
    num_rows, width = vectors.shape
    padded = np.full((-(-num_rows // LANES) * LANES, width), np.inf, np.float32)
    padded[:num_rows] = vectors
    return aligned(padded.reshape(-1, LANES, width).transpose(0, 2, 1))


@jit
def to_tile(tiles: Any, tile: int, table: Any, row: int, width: int) -> Any:
    """The bits of the squared distances of the vectors of a tile to a row of a table [_, width]."""
    total = spread(np.float32(0))
    for dim in range(width):
        total = add_square(total, load(tiles, (tile * width + dim) * LANES), spread(table[row, dim]))
    return bits(total)
