"""Exact assignment of points whose centroids have moved: a point looks only at the neighbours of its old centroid."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.kmeans.simd import (
    LANES,
    aligned_floats,
    aligned_ints,
    at_most,
    bits_of,
    float_of,
    lowest_bit,
    nearer,
    smaller,
    spread,
    store,
)
from torchrec_cce.clustering.kmeans.tiles import to_tile
from torchrec_cce.jit import jit

_RINGS = 64
_LAST_RING = np.int32(_RINGS - 1)

Reassign = Callable[
    [
        npt.NDArray[np.float32],
        npt.NDArray[np.int64],
        npt.NDArray[np.float32],
        npt.NDArray[np.float32],
        int,
        int,
        npt.NDArray[np.int32],
    ],
    None,
]


@functools.cache
def reassign_loop(width: int) -> Reassign:
    """The loop `(points, starts, centroids, packed, first, last, codes)` for vectors of `width` floats.

    - `points`: [N, width] float32, at most 1 in absolute value; cluster i is from `starts[i]` to `starts[i + 1]`.
    - `starts`: [k + 1] int64.
    - `centroids`: [k, width] float32, at most 1 in absolute value.
    - `packed`: `pack_tiles(centroids)`.
    - `first`, `last`: the points of clusters `first` to `last - 1` are assigned.
    - `codes`: [N] int32, written for those points, with the bits that `NearestCentroid` finds.

    A centroid `c` can be at least as near to a point `x` as the old centroid `a` only where `|c − a| ≤ 2|x − a|`. For
    each cluster, the centroids within reach of its farthest point are listed in rings around `a`, and the points are
    sorted by how many rings they need. Then 16 points at a time are compared with the centroids of those rings.
    """
    # Computed squares are within a factor of 1 ± ε, ε = (d + 2)·2^-24, of the true ones. If that of |c − a| exceeds
    # 4(1 + m) times that of |x − a|, then |c − a| > 2q|x − a| with q² = (1 + m)(1 − ε)/(1 + ε), so that
    # |x − c| > (2q − 1)|x − a|, and c is farther as computed, too, if (2q − 1)²(1 − ε) ≥ 1 + ε. m = 3ε is just enough
    # to first order, so 8ε is plenty. Squares that are so small that float32 rounds them more coarsely are far below
    # `least`.
    margin = 1 + 8 * (width + 2) * 2.0**-24
    least = 2.0**-100

    @jit
    def loop(
        points: npt.NDArray[np.float32],
        starts: npt.NDArray[np.int64],
        centroids: npt.NDArray[np.float32],
        packed: npt.NDArray[np.float32],
        first: int,
        last: int,
        codes: npt.NDArray[np.int32],
    ) -> None:
        num_rows = centroids.shape[0]
        room = LANES
        for row in range(first, last):
            room = max(room, starts[row + 1] - starts[row])
        room = -(-room // LANES) * LANES
        tiles = aligned_floats(room * width)
        nearest, found = aligned_ints(room), aligned_ints(room)
        order, classes = np.empty(room, np.int32), np.empty(room, np.int32)
        hits, rings, near_rows = (
            np.empty(num_rows, np.int32),
            np.empty(num_rows, np.int32),
            np.empty(num_rows, np.int32),
        )
        near = np.empty((num_rows, width), np.float32)
        distances = aligned_ints(LANES)
        ring_ends, class_ends = np.empty(_RINGS + 1, np.int64), np.empty(_RINGS + 1, np.int64)
        for row in range(first, last):
            begin, count = starts[row], starts[row + 1] - starts[row]
            if count == 0:
                continue
            num_tiles = -(-count // LANES)
            for lane in range(count):
                order[lane] = lane
            _fill(tiles, points, begin, order, count, width)
            for tile in range(num_tiles):
                store(nearest, tile * LANES, to_tile(tiles, tile, centroids, row, width))
            farthest = np.int32(0)
            for lane in range(count):
                farthest = max(farthest, nearest[lane])
            reach = 4 * margin * np.float64(float_of(farthest)) + least
            per_unit = np.float32(_RINGS / reach)

            num_hits = 0
            reach_bits = bits_of(np.float32(reach))
            for group in range(packed.size // (width * LANES)):
                to_group = to_tile(packed, group, centroids, row, width)
                mask = at_most(to_group, reach_bits)
                if mask:
                    store(distances, 0, to_group)
                while mask:
                    lane = lowest_bit(mask)
                    hits[num_hits] = group * LANES + lane
                    rings[num_hits] = min(np.int32(float_of(distances[lane]) * per_unit), _LAST_RING)
                    num_hits += group * LANES + lane != row
                    mask &= mask - 1
            _count(rings, num_hits, ring_ends)
            for hit in range(num_hits):
                place = ring_ends[rings[hit]]
                ring_ends[rings[hit]] = place + 1
                near_rows[place] = hits[hit]
                for dim in range(width):
                    near[place, dim] = centroids[hits[hit], dim]

            for lane in range(count):
                needed = np.float32(4 * margin * np.float64(float_of(nearest[lane])) + least)
                classes[lane] = min(np.int32(needed * per_unit), _LAST_RING)
            _count(classes, count, class_ends)
            for lane in range(count):
                place = class_ends[classes[lane]]
                class_ends[classes[lane]] = place + 1
                order[place] = lane

            _fill(tiles, points, begin, order, count, width)
            for tile in range(num_tiles):
                best, code = to_tile(tiles, tile, centroids, row, width), spread(np.int32(row))
                for hit in range(ring_ends[classes[order[min(tile * LANES + LANES, count) - 1]]]):
                    distance = to_tile(tiles, tile, near, hit, width)
                    code = nearer(code, best, spread(near_rows[hit]), distance)
                    best = smaller(best, distance)
                store(found, tile * LANES, code)
            for lane in range(count):
                codes[begin + order[lane]] = found[lane]

    return loop


@jit
def _fill(tiles: Any, points: Any, begin: int, order: Any, count: int, width: int) -> None:
    """Lay points `begin + order[:count]` out as tiles: [count / 16, width, 16], the last point repeated at the end."""
    for tile in range(-(-count // LANES)):
        for lane in range(LANES):
            point = begin + order[min(tile * LANES + lane, count - 1)]
            for dim in range(width):
                tiles[(tile * width + dim) * LANES + lane] = points[point, dim]


@jit
def _count(rings: Any, count: int, ends: Any) -> None:
    """Where each ring starts in a sorted list; once the list is filled in from there, where it ends."""
    ends[:] = 0
    for index in range(count):
        ends[rings[index] + 1] += 1
    for ring in range(_RINGS):
        ends[ring + 1] += ends[ring]
