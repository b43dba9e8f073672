"""Where a method's loss curve meets that of full tables: the size that compression factors are made of."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from torchrec_cce.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """The smallest size at which a curve reaches the baseline: as measured, or a range beyond what was measured.

    A size is a number of trained parameters, and the curve is taken over its logarithm, as the paper draws it. Where
    the largest size does not reach the baseline, the line through its last two points is optimistic, the parabola
    through its last three pessimistic (page 14 of the paper).
    """

    optimistic: float
    """A size; infinite where not even the line comes down to the baseline."""
    pessimistic: float
    """A size, at least the optimistic one; infinite where the parabola turns before it reaches the baseline."""
    is_measured: bool
    """Whether the curve reaches the baseline between sizes that were measured: then both are equal."""
    is_smallest: bool = False
    """Whether the smallest size that was measured does already: a smaller one may."""


def crossing(losses: Mapping[int, float], baseline: float) -> Crossing:
    """Where `losses`, size → loss, come down to `baseline`.

    Raises:
        ConfigError: fewer than two sizes, one that is not positive, or a loss that is not finite.
    """
    if len(losses) < 2 or min(losses) < 1 or not all(map(math.isfinite, [*losses.values(), baseline])):
        raise ConfigError(f"losses={dict(losses)}: a crossing needs two sizes above 0 with finite losses, or more")
    sizes = sorted(losses)
    x = np.log([float(size) for size in sizes])
    y = np.array([losses[size] for size in sizes]) - baseline
    reached = np.flatnonzero(y <= 0)
    if len(reached):
        at = int(reached[0])
        found = sizes[0] if at == 0 else _size(_root_of_line(x[at - 1 : at + 1], y[at - 1 : at + 1]))
        return Crossing(optimistic=found, pessimistic=found, is_measured=True, is_smallest=at == 0)
    line = _root_of_line(x[-2:], y[-2:])
    parabola = _root_of_parabola(x[-3:], y[-3:]) if len(x) > 2 else line
    # A curve that bends down would make the parabola the optimistic one.
    return Crossing(optimistic=_size(min(line, parabola)), pessimistic=_size(max(line, parabola)), is_measured=False)


def bootstrap(
    losses: Mapping[int, Sequence[float]],
    baseline: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """A confidence interval, over seeds, of the optimistic crossing: sizes (lowest, highest), either may be infinite.

    Args:
        losses: size → the loss of each seed.
        baseline: the loss of each seed of the full table.
    """
    found = resample(losses, baseline, resamples=resamples, seed=seed)
    tail = (1 - confidence) / 2
    low, high = np.quantile([resampled.optimistic for resampled in found], [tail, 1 - tail], method="nearest")
    return float(low), float(high)


def resample(
    losses: Mapping[int, Sequence[float]], baseline: Sequence[float], *, resamples: int, seed: int = 0
) -> list[Crossing]:
    """The crossings of the means of as many seeds, drawn again and again with replacement. Arguments as `bootstrap`."""
    rng = np.random.default_rng(seed)
    arrays = {size: np.asarray(values, np.float64) for size, values in losses.items()}
    against = np.asarray(baseline, np.float64)

    def mean(values: npt.NDArray[np.float64]) -> float:
        return float(values[rng.integers(0, len(values), len(values))].mean())

    return [crossing({size: mean(values) for size, values in arrays.items()}, mean(against)) for _ in range(resamples)]


def _size(log_size: float) -> float:
    return math.exp(log_size) if log_size < 700 else math.inf


def _root_of_line(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> float:
    """Where the line through two points is 0, to the right of both; infinite where it does not fall."""
    slope = (y[1] - y[0]) / (x[1] - x[0])
    return float(x[1] - y[1] / slope) if slope < 0 else math.inf


def _root_of_parabola(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> float:
    """Where the parabola through three points is first 0, to the right of the last; infinite where it never is."""
    first, second = np.diff(y) / np.diff(x)
    # From the last point on it is bend·t² + slope·t + height, and height is above 0.
    bend = (second - first) / (x[2] - x[0])
    slope = second + bend * (x[2] - x[1])
    height = y[2]
    discriminant = slope**2 - 4 * bend * height
    down = math.sqrt(discriminant) - slope if discriminant >= 0 else 0.0
    return float(x[2] + 2 * height / down) if down > 0 else math.inf
