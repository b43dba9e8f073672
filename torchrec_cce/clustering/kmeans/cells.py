"""Exact nearest centroid among many: the centroids lie in cells, and a point looks at only a few of those."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.kmeans.simd import (
    HIGHEST,
    LANES,
    add_square,
    add_square_outside,
    aligned,
    aligned_ints,
    at_most,
    bits,
    float_of,
    load,
    lowest_bit,
    smaller,
    smallest,
    spread,
    store,
    where_equal,
)
from torchrec_cce.jit import jit

CELL = 64
"""The number of centroids in a cell. Infinite centroids pad the last one."""
_STEPS = CELL // LANES
_AT_A_TIME = 64
_INFINITY = np.int32(0x7F800000)

Search = Callable[..., None]


class Cells:
    """Centroids in compact cells of 64, the cells in blocks of 16, with boxes around every cell and block.

    An object is read-only, so any number of threads may share it.
    """

    def __init__(self, centroids: npt.NDArray[np.float32]) -> None:
        """Cut `centroids: [k, d] float32`, finite, into cells: each cut goes across the widest side near the middle."""
        num_rows, width = centroids.shape
        num_blocks = -(-num_rows // (CELL * LANES))
        num_blocks += -num_blocks % LANES
        num_cells = num_blocks * LANES
        # Padding is infinitely far from every point. Its boxes are too: their near side is +∞.
        members = np.full((num_cells, width, CELL), np.inf, np.float32)
        rows = np.full((num_cells, CELL), HIGHEST, np.int32)
        boxes = np.full((num_cells, 2, width), np.inf, np.float32)
        for cell, cut in enumerate(_cut(centroids, np.arange(num_rows))):
            inside = centroids[cut]
            members[cell, :, : len(cut)] = inside.T
            rows[cell, : len(cut)] = cut
            boxes[cell] = inside.min(axis=0), inside.max(axis=0)
        in_blocks = boxes.reshape(num_blocks, LANES, 2, width)
        lows = in_blocks[:, :, 0].min(axis=1)
        highs = np.where(np.isinf(in_blocks[:, :, 1]), -np.inf, in_blocks[:, :, 1]).max(axis=1)
        highs[np.isinf(lows)] = np.inf
        block_boxes = np.stack([lows, highs], axis=1).astype(np.float32).reshape(-1, LANES, 2, width)
        self._search = _search(width)
        self._arrays = (
            aligned(members),
            aligned(rows),
            aligned(in_blocks.transpose(0, 2, 3, 1)),
            aligned(block_boxes.transpose(0, 2, 3, 1)),
        )

    def __call__(
        self,
        points: npt.NDArray[np.float32],
        codes: npt.NDArray[np.int64],
        distances: npt.NDArray[np.float32],
    ) -> None:
        """Write what `Scores` writes, bit for bit where it is finite; `points: [N, d]` are C-contiguous."""
        self._search(points, *self._arrays, codes, distances)


def _cut(centroids: npt.NDArray[np.float32], rows: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    """The rows of each cell. All cells but the last are full, and 16 consecutive cells are close to each other."""
    if len(rows) <= CELL:
        yield np.sort(rows)
        return
    unit = CELL * LANES if len(rows) > CELL * LANES else CELL
    middle = -(-len(rows) // unit) // 2 * unit
    inside = centroids[rows].astype(np.float64)
    order = np.argpartition(inside[:, inside.var(axis=0).argmax()], middle)
    yield from _cut(centroids, rows[order[:middle]])
    yield from _cut(centroids, rows[order[middle:]])


@functools.cache
def _search(width: int) -> Search:
    """The search for vectors of `width` floats: `(points, members, rows, cell boxes, block boxes, codes, distances)`.

    A point visits the nearest cell of the nearest block first, and then every cell whose box is at most as far as the
    best centroid so far. This misses no centroid, and needs no margin. For a centroid `c` in a box, each rounded
    difference to a side of the box is at most the rounded difference to `c`, because rounding keeps the order. The
    squares and the sums keep the order too, since they are rounded in the same sequence. So the computed distance to
    the box is at most the computed distance to `c`.

    Distances are compared as integers, see `bits`. Points are handled 64 at a time, and each step is done for all of
    them before the next step, so that the CPU works on several points while it waits for one.
    """

    @jit
    def search(
        points: npt.NDArray[np.float32],
        members: npt.NDArray[np.float32],
        rows: npt.NDArray[np.int32],
        cell_boxes: npt.NDArray[np.float32],
        block_boxes: npt.NDArray[np.float32],
        codes: npt.NDArray[np.int64],
        distances: npt.NDArray[np.float32],
    ) -> None:
        num_blocks = block_boxes.size // (2 * width)
        to_blocks = aligned_ints(_AT_A_TIME * num_blocks)
        to_cells = aligned_ints(LANES)
        best = np.empty(_AT_A_TIME, np.int32)
        code = np.empty(_AT_A_TIME, np.int32)
        first = np.empty(_AT_A_TIME, np.int64)
        near_points = np.empty(_AT_A_TIME * num_blocks, np.int32)
        near_blocks = np.empty(_AT_A_TIME * num_blocks, np.int32)
        pair_points = np.empty(_AT_A_TIME * num_blocks * LANES, np.int32)
        pair_cells = np.empty(_AT_A_TIME * num_blocks * LANES, np.int32)
        pair_bounds = np.empty(_AT_A_TIME * num_blocks * LANES, np.int32)
        for begin in range(0, points.shape[0], _AT_A_TIME):
            count = min(_AT_A_TIME, points.shape[0] - begin)
            for point in range(count):
                nearest, start = HIGHEST, 0
                for block in range(0, num_blocks, LANES):
                    bounds = _to_boxes(block_boxes, block // LANES, points, begin + point, width)
                    store(to_blocks, point * num_blocks + block, bounds)
                    bound = smallest(bounds)
                    start = block if bound < nearest else start
                    nearest = min(bound, nearest)
                near_points[point] = point
                near_blocks[point] = start + lowest_bit(at_most(load(to_blocks, point * num_blocks + start), nearest))
                best[point], code[point], first[point] = _INFINITY, 0, -1
            num_near = count
            for turn in range(2):
                num_pairs = 0
                for near in range(num_near):
                    point, block = near_points[near], near_blocks[near]
                    bounds = _to_boxes(cell_boxes, block, points, begin + point, width)
                    store(to_cells, 0, bounds)
                    mask = at_most(bounds, smallest(bounds) if turn == 0 else best[point])
                    while mask:
                        lane = lowest_bit(mask)
                        pair_points[num_pairs] = point
                        pair_cells[num_pairs] = block * LANES + lane
                        pair_bounds[num_pairs] = to_cells[lane]
                        num_pairs += block * LANES + lane != first[point]
                        mask &= mask - 1
                for pair in range(num_pairs):
                    point, cell = pair_points[pair], pair_cells[pair]
                    if pair_bounds[pair] > best[point]:
                        continue
                    nearest = _nearest_in_cell(members, cell, points, begin + point, width)
                    if nearest <= best[point]:
                        row = _row_in_cell(members, cell, points, begin + point, width, rows, nearest)
                        code[point] = row if nearest < best[point] or row < code[point] else code[point]
                        best[point] = nearest
                    first[point] = cell
                if turn == 1:
                    break
                num_near = 0
                for point in range(count):
                    for block in range(0, num_blocks, LANES):
                        mask = at_most(load(to_blocks, point * num_blocks + block), best[point])
                        while mask:
                            near_points[num_near] = point
                            near_blocks[num_near] = block + lowest_bit(mask)
                            num_near += 1
                            mask &= mask - 1
            for point in range(count):
                codes[begin + point] = code[point]
                distances[begin + point] = float_of(best[point])

    return search


@jit
def _to_boxes(boxes: Any, number: int, points: Any, point: int, width: int) -> Any:
    """Distances of a point to 16 boxes, group `number` of them."""
    total = spread(np.float32(0))
    at = number * 2 * width * LANES
    for dim in range(width):
        low, high = load(boxes, at + dim * LANES), load(boxes, at + (width + dim) * LANES)
        total = add_square_outside(total, spread(points[point, dim]), low, high)
    return bits(total)


@jit
def _to_members(members: Any, cell: int, step: int, points: Any, point: int, width: int) -> Any:
    """Distances of a point to 16 centroids of a cell."""
    total = spread(np.float32(0))
    for dim in range(width):
        total = add_square(total, spread(points[point, dim]), load(members, (cell * width + dim) * CELL + step * LANES))
    return bits(total)


@jit
def _nearest_in_cell(members: Any, cell: int, points: Any, point: int, width: int) -> Any:
    nearest = _to_members(members, cell, 0, points, point, width)
    for step in range(1, _STEPS):
        nearest = smaller(nearest, _to_members(members, cell, step, points, point, width))
    return smallest(nearest)


@jit
def _row_in_cell(members: Any, cell: int, points: Any, point: int, width: int, rows: Any, distance: Any) -> Any:
    """The lowest row of the centroids of a cell that are at `distance`."""
    lowest = where_equal(_to_members(members, cell, 0, points, point, width), distance, load(rows, cell * CELL))
    for step in range(1, _STEPS):
        at_step = _to_members(members, cell, step, points, point, width)
        lowest = smaller(lowest, where_equal(at_step, distance, load(rows, cell * CELL + step * LANES)))
    return smallest(lowest)
