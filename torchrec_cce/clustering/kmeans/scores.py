"""Exact nearest centroid by scores, which cost half of a distance: only centroids that may be nearest are measured."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.kmeans.simd import (
    HIGHEST,
    LANES,
    add_product,
    aligned_floats,
    aligned_ints,
    at_most,
    float_of,
    higher,
    load,
    lower,
    lowest_bit,
    not_higher,
    smallest,
    spread,
    spread_at,
    store,
    where_lower,
)
from torchrec_cce.clustering.kmeans.tiles import pack_tiles, to_tile
from torchrec_cce.jit import jit

_STEP = 4
"""The number of centroids scored at a time: the scores of more, for 16 points, would not fit the registers of AVX2."""
_FARTHEST = 2.0**100
"""The squared length from which scores could overflow; points and centroids as long as that are measured instead."""

Search = Callable[..., int]


class Scores:
    """Centroids around their mean, with half of their squared lengths. Read-only, so threads may share an object."""

    def __init__(self, centroids: npt.NDArray[np.float32]) -> None:
        """Prepare `centroids: [k, d] float32`, finite."""
        num_rows, width = centroids.shape
        centre = centroids.mean(axis=0, dtype=np.float64).astype(np.float32)
        packed = np.zeros((-(-num_rows // LANES) * LANES, 1 + width), np.float32)
        packed[num_rows:, 0] = np.inf
        with np.errstate(over="ignore"):
            around = centroids - centre
            halves = np.square(around.astype(np.float64)).sum(axis=1) / 2
            packed[:num_rows, 0], packed[:num_rows, 1:] = halves, -around
        self._search = score_search(width)
        self._arrays = (
            centre,
            packed.reshape(-1, _STEP, 1 + width).transpose(0, 2, 1).reshape(-1),
            pack_tiles(centroids),
            _FARTHEST if halves.max() < _FARTHEST else 0.0,
        )

    def __call__(
        self,
        points: npt.NDArray[np.float32],
        codes: npt.NDArray[np.int64],
        distances: npt.NDArray[np.float32],
    ) -> int:
        """Write the nearest centroids of `points: [N, d]`, C-contiguous, to `codes: [N]` and `distances: [N]`.

        Returns the number of points whose lowest score did not decide which centroid is nearest.
        """
        return self._search(points, *self._arrays, codes, distances)


@jit
def highest_score(distance: float, squared_length: float, width: int) -> float:
    """A centroid whose score is higher is not as near to a point as `distance`, the computed square to some centroid.

    `squared_length` is that of the point around the centre. Below, d is `width`, u = 2^-24, and terms of u² are left
    out, for which there is room at the end, as for rounding the result to float32.

    - A computed square R is at least (1 − (d + 2)u)·ρ², where ρ is the true distance: rounding the difference counts
      twice in its square, and every sum rounds once. So centroids computed as near as R have ρ² ≤ (1 + (d + 2)u)·R.
    - Around the centre, the point x and such a centroid y were rounded, each coordinate by at most u times itself. So
      |x − y| ≤ ρ + u(|x| + |y|) and, with s = |x| + ρ, |y| ≤ (1 + 2u)s. Together, ½|x − y|² ≤ ½ρ² + 2us².
    - The true score ½|y|² − x·y is ½|x − y|² − ½|x|². The computed one is off by at most ½us² from rounding ½|y|², and
      by u times each of d sums, none of which is beyond ½|y|² + |x|·|y| ≤ 1½s²: in all by at most (½ + 1½d)us².
    - s² ≤ 2(|x|² + ρ²). So the computed score is at most ½(R − |x|²) + (3½d + 6)u(|x|² + R).

    Numbers so small that float32 rounds them more coarsely, or to zero, are far below the last term.
    """
    return 0.5 * (distance - squared_length) + (4 * width + 10) * 2.0**-24 * (squared_length + distance) + 2.0**-100


@jit
def _lowest_score(around: Any, packed: Any, tile: int, num_steps: int, width: int) -> Any:
    """For each of 16 points around the centre, the lowest score of the 16 centroids of a tile; ∞ if all are NaN."""
    lowest = spread(np.float32(np.inf))
    for step in range(num_steps):
        at = (tile * num_steps + step) * (1 + width) * _STEP
        first, second = spread_at(packed, at), spread_at(packed, at + 1)
        third, fourth = spread_at(packed, at + 2), spread_at(packed, at + 3)
        for dim in range(width):
            values = load(around, dim * LANES)
            at += _STEP
            first = add_product(first, values, spread_at(packed, at))
            second = add_product(second, values, spread_at(packed, at + 1))
            third = add_product(third, values, spread_at(packed, at + 2))
            fourth = add_product(fourth, values, spread_at(packed, at + 3))
        lowest = lower(lower(lower(first, second), lower(third, fourth)), lowest)
    return lowest


@functools.cache
def score_search(width: int) -> Search:
    """The search for vectors of `width` floats: `(points, centre, packed, tiles, farthest, codes, distances)`.

    The score of a centroid y for a point x is ½|y|² − x·y, both around the centre so that it keeps its digits where the
    data are far from the origin. Plus ½|x|² it is half of the squared distance. 16 points at a time are scored against
    tiles of 16 centroids. Each point keeps the lowest score, the tile that has it, and the lowest score of the other
    tiles. Then the distances to the centroids of that tile are computed, as `Σ (x − c)²` term by term. Nearly always
    they leave no other tile a chance, see `highest_score`. Else all scores are computed once more, and the distances to
    the centroids of every tile that has a chance.
    """

    @jit
    def search(
        points: npt.NDArray[np.float32],
        centre: npt.NDArray[np.float32],
        packed: npt.NDArray[np.float32],
        tiles: npt.NDArray[np.float32],
        farthest: float,
        codes: npt.NDArray[np.int64],
        distances: npt.NDArray[np.float32],
    ) -> int:
        infinity = np.float32(np.inf)
        num_tiles = tiles.size // (width * LANES)
        # Always LANES / STEP. The compiler must not know it: else it would unroll the steps and take the minimum of
        # their scores at the end, and there are not enough registers for so many.
        num_steps = packed.size // (num_tiles * (1 + width) * _STEP)
        around = aligned_floats(width * LANES)
        others, limits = aligned_floats(LANES), aligned_floats(LANES)
        winners, nearest = aligned_ints(LANES), aligned_ints(LANES)
        num_undecided = 0
        for start in range(0, points.shape[0], LANES):
            count = min(LANES, points.shape[0] - start)
            for lane in range(LANES):
                point = start + min(lane, count - 1)
                for dim in range(width):
                    around[dim * LANES + lane] = points[point, dim] - centre[dim]
            lowest, other, winner = spread(infinity), spread(infinity), spread(np.int32(0))
            for tile in range(num_tiles):
                score = _lowest_score(around, packed, tile, num_steps, width)
                other = lower(other, higher(score, lowest))
                winner = where_lower(score, lowest, spread(np.int32(tile)), winner)
                lowest = lower(score, lowest)
            store(others, 0, other)
            store(winners, 0, winner)
            store(limits, 0, spread(-infinity))
            decided, lanes_used = True, (1 << count) - 1
            for lane in range(count):
                point, tile = start + lane, winners[lane]
                to_centroids = to_tile(tiles, tile, points, point, width)
                nearest[lane] = smallest(to_centroids)
                codes[point] = tile * LANES + lowest_bit(at_most(to_centroids, nearest[lane]))
                squared_length = 0.0
                for dim in range(width):
                    squared_length += np.float64(around[dim * LANES + lane]) ** 2
                limit = np.float32(highest_score(np.float64(float_of(nearest[lane])), squared_length, width))
                scored = squared_length < farthest
                if not (scored and others[lane] > limit):
                    limits[lane], nearest[lane] = limit if scored else infinity, HIGHEST
                    num_undecided += 1
                    decided = False
            for tile in range(0 if decided else num_tiles):
                score = _lowest_score(around, packed, tile, num_steps, width)
                mask = not_higher(score, load(limits, 0)) & lanes_used
                while mask:
                    lane = lowest_bit(mask)
                    mask &= mask - 1
                    to_centroids = to_tile(tiles, tile, points, start + lane, width)
                    in_tile = smallest(to_centroids)
                    if in_tile < nearest[lane]:
                        nearest[lane] = in_tile
                        codes[start + lane] = tile * LANES + lowest_bit(at_most(to_centroids, in_tile))
            for lane in range(count):
                distances[start + lane] = float_of(nearest[lane])
        return num_undecided

    return search
