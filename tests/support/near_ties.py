"""Points and centroids of which it is hard to say who is nearest to whom, and the answers by definition."""

import numpy as np
import numpy.typing as npt

from tests.support.kernel_references import reference_distances


def gaussian(rng: np.random.Generator, *shape: int, offset: float = 0) -> npt.NDArray[np.float32]:
    return (rng.standard_normal(shape) + offset).astype(np.float32)


Answers = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]


def by_definition(points: npt.NDArray[np.float32], centroids: npt.NDArray[np.float32]) -> Answers:
    """The first of the smallest float32 distances."""
    distances = reference_distances(points, centroids)
    codes = distances.argmin(axis=1)
    return codes, distances[np.arange(len(points)), codes]


def assert_same_bits(found: Answers, expected: Answers) -> None:
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1].view(np.int32), expected[1].view(np.int32))


Made = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


def spread_out(rng: np.random.Generator, rows: int, count: int, width: int) -> Made:
    return gaussian(rng, rows, width), gaussian(rng, count, width)


def clustered(rng: np.random.Generator, rows: int, count: int, width: int) -> Made:
    middles = gaussian(rng, 5, width)
    near = middles[rng.integers(0, 5, rows)] + 1e-3 * gaussian(rng, rows, width)
    return near, middles[rng.integers(0, 5, count)] + 1e-3 * gaussian(rng, count, width)


def on_a_lattice(rng: np.random.Generator, rows: int, count: int, width: int) -> Made:
    """Duplicates, and points in the middle between many centroids."""
    points = rng.integers(-6, 7, (count, width)).astype(np.float32) / 2
    return rng.integers(-3, 4, (rows, width)).astype(np.float32), points


def far_away(rng: np.random.Generator, rows: int, count: int, width: int) -> Made:
    """So far that float32 leaves few digits of a difference: many ties by rounding."""
    return gaussian(rng, rows, width, offset=1e5), gaussian(rng, count, width, offset=1e5)


def far_from_each_other(rng: np.random.Generator, rows: int, count: int, width: int) -> Made:
    return gaussian(rng, rows, width), gaussian(rng, count, width, offset=1e6)


def of_all_sizes(rng: np.random.Generator, rows: int, count: int, width: int) -> Made:
    """From squares that are denormal, or zero, to those that nearly overflow."""
    sizes = [np.exp2(rng.uniform(-80, 60, (number, 1))).astype(np.float32) for number in (rows, count)]
    return gaussian(rng, rows, width) * sizes[0], gaussian(rng, count, width) * sizes[1]


def in_one_line(rng: np.random.Generator, rows: int, count: int, width: int) -> Made:
    """Only the last dimension differs."""
    centroids, points = np.zeros((rows, width), np.float32), np.zeros((count, width), np.float32)
    centroids[:, -1], points[:, -1] = gaussian(rng, rows), gaussian(rng, count)
    return centroids, points


def centroids_themselves(rng: np.random.Generator, rows: int, count: int, width: int) -> Made:
    centroids = gaussian(rng, rows, width)
    return centroids, centroids[rng.integers(0, rows, count)]


def a_bit_apart(rng: np.random.Generator, rows: int, count: int, width: int) -> Made:
    """Centroids that differ in their last bits, and points among them."""
    near = (gaussian(rng, width).view(np.int32) + rng.integers(-2, 3, (rows + count, width))).astype(np.int32)
    return near[:rows].view(np.float32), near[rows:].view(np.float32)


def a_bit_from_halfway(rng: np.random.Generator, rows: int, count: int, width: int) -> Made:
    """Points as near as can be to the middle between two centroids, and all else far away."""
    centroids = gaussian(rng, rows, width)
    pairs = centroids[rng.integers(0, rows, (count, 2))]
    middles = pairs.mean(axis=1).view(np.int32) + rng.integers(-1, 2, (count, width))
    return centroids, middles.astype(np.int32).view(np.float32)


def huge_and_close(rng: np.random.Generator, rows: int, count: int, width: int) -> Made:
    """Numbers about 2^40 that differ by a few units of their last place, on both sides of the origin."""
    signs = rng.choice([-1.0, 1.0], (rows + count, 1))
    made = (signs * (2.0**40 + 2.0**17 * rng.integers(-4, 5, (rows + count, width)))).astype(np.float32)
    return made[:rows], made[rows:]


def denormal(rng: np.random.Generator, rows: int, count: int, width: int) -> Made:
    """Numbers below 2^-126, and some whose squares alone are so small."""
    made = gaussian(rng, rows + count, width) * np.exp2(rng.choice([-70, -130, -140], (rows + count, 1)))
    return made[:rows].astype(np.float32), made[rows:].astype(np.float32)


KINDS = [
    spread_out,
    clustered,
    on_a_lattice,
    far_away,
    far_from_each_other,
    of_all_sizes,
    in_one_line,
    centroids_themselves,
    a_bit_apart,
    a_bit_from_halfway,
    huge_and_close,
    denormal,
]
