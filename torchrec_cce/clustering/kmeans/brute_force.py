"""Exact nearest centroid by brute force: a compiled loop that compares every point with every centroid."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numba.core import types
from numba.extending import intrinsic

from torchrec_cce.jit import jit

GROUP = 4
"""The number of centroids compared at a time. Infinite centroids, which never win, pad a table to a multiple of it."""
BLOCK = 8
"""The number of dimensions at a time where vectors are too wide for the registers; zeros pad a vector to a multiple."""
MAX_WHOLE_WIDTH = 16
"""The widest vectors that are compared in one piece."""

NearestLoop = Callable[
    [npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.int64], npt.NDArray[np.float32]], None
]


def _fused_multiply_add(_context: Any, a: Any, b: Any, c: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(a, b, c), generate


# `a·b + c` with one rounding, asked for by name: were the compiler free to contract or not, the vector part of a loop
# and its remainder could round differently, and an answer would depend on a point's place in its batch.
fma: Callable[[Any, Any, Any], np.float32] = intrinsic(_fused_multiply_add)


@functools.cache
def nearest_loop(width: int) -> NearestLoop:
    """The loop `(points, centroids, codes, distances)` for vectors of `width` floats.

    - `points`: [N, width] float32.
    - `centroids`: [k / GROUP, blocks, GROUP, width / blocks] float32, see `pack_centroids`.
    - `codes`, `distances`: [N] int64 and float32, which the loop writes.

    A tile of points lies transposed, so that a vector register holds one coordinate of 16 points, and each point's best
    distance stays in its own lane: there is no reduction, and no point sees another. Distances are `Σ (x − c)²` term by
    term. `‖x‖² − 2x·c + ‖c‖²` would cancel far from the origin, and saves little where a core adds and multiplies at
    once. The scan keeps only which group of centroids won; the winner within the group is found once, at the end.
    """
    # Measured on Zen 5: up to 8 floats, wide tiles (the coordinates of a group stay in registers and the points stream
    # from L1); up to 16, the points stay in registers; beyond, blocks of dimensions with partial sums, and tiles of L1.
    lanes = 512 if width <= 8 else 16 if width <= MAX_WHOLE_WIDTH else max(16, 8192 // width // 16 * 16)
    whole = width <= MAX_WHOLE_WIDTH
    dims = width if whole else BLOCK
    infinity = np.float32(np.inf)
    zero = np.float32(0)

    @jit
    def loop(
        points: npt.NDArray[np.float32],
        centroids: npt.NDArray[np.float32],
        codes: npt.NDArray[np.int64],
        distances: npt.NDArray[np.float32],
    ) -> None:
        num_points, num_groups, num_blocks = points.shape[0], centroids.shape[0], centroids.shape[1]
        tile = np.zeros((num_blocks, dims, lanes), np.float32)
        partial = np.empty((GROUP, lanes), np.float32)
        best = np.empty(lanes, np.float32)
        winner = np.empty(lanes, np.int32)
        for start in range(0, num_points, lanes):
            count = min(lanes, num_points - start)
            for lane in range(lanes):
                point = start + min(lane, count - 1)
                for dim in range(width):
                    tile[dim // dims, dim % dims, lane] = points[point, dim]
                best[lane] = infinity
                winner[lane] = 0
            for group in range(num_groups):
                if not whole:
                    for block in range(num_blocks - 1):
                        for lane in range(lanes):
                            for row in range(GROUP):
                                total = partial[row, lane] if block > 0 else zero
                                for dim in range(dims):
                                    gap = tile[block, dim, lane] - centroids[group, block, row, dim]
                                    total = fma(gap, gap, total)
                                partial[row, lane] = total
                last = 0 if whole else num_blocks - 1
                for lane in range(lanes):
                    nearest = infinity
                    for row in range(GROUP):
                        total = zero if whole else partial[row, lane]
                        for dim in range(dims):
                            gap = tile[last, dim, lane] - centroids[group, last, row, dim]
                            total = fma(gap, gap, total)
                        nearest = total if total < nearest else nearest
                    closer = nearest < best[lane]
                    best[lane] = nearest if closer else best[lane]
                    winner[lane] = group if closer else winner[lane]
            for lane in range(count):
                group = winner[lane]
                nearest = infinity
                code = 0
                for row in range(GROUP):
                    total = zero
                    for block in range(num_blocks):
                        for dim in range(dims):
                            gap = tile[block, dim, lane] - centroids[group, block, row, dim]
                            total = fma(gap, gap, total)
                    if total < nearest:
                        nearest = total
                        code = row
                codes[start + lane] = group * GROUP + code
                distances[start + lane] = nearest

    return loop


def pack_centroids(centroids: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """`centroids: [k, d] float32` in the layout that `nearest_loop(d)` reads."""
    num_rows, width = centroids.shape
    dims = width if width <= MAX_WHOLE_WIDTH else BLOCK
    num_groups, num_blocks = -(-num_rows // GROUP), -(-width // dims)
    padded = np.zeros((num_groups * GROUP, num_blocks * dims), np.float32)
    padded[:num_rows, :width] = centroids
    padded[num_rows:] = np.inf
    return np.ascontiguousarray(padded.reshape(num_groups, GROUP, num_blocks, dims).transpose(0, 2, 1, 3))
