"""How many times smaller than full tables a method is where its loss curve meets theirs: Table 1 of the paper, and the
bytes that it leaves out."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from torchrec_cce.errors import ConfigError
from torchrec_cce.experiments.curve import Curve, SeedGroup
from torchrec_cce.training.model import Sizes

State = Literal["measured", "smallest cap", "extrapolated", "never", "one cap"]
"""How the curve meets the loss of full tables: between two caps; at the smallest cap already, so that a smaller one may
do; beyond the largest; not even by a straight line; or there is only one cap, whose loss is higher."""

_RESAMPLES = 1000
_TAIL = 0.025


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


def resample(
    losses: Mapping[int, Sequence[float]], baseline: Sequence[float], *, resamples: int, seed: int = 0
) -> list[Crossing]:
    """The crossings of the means of as many seeds, drawn again and again with replacement.

    Args:
        losses: size → the loss of each seed.
        baseline: the loss of each seed of the full table.
    """
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


@dataclass(frozen=True, kw_only=True)
class Range:
    """A figure at the crossing."""

    pessimistic: float
    """By the parabola through the last three points; infinite for a size, 0 for a factor, if it never arrives."""
    optimistic: float
    """By the line through the last two points, which may never arrive either. Equal to the pessimistic figure where the
    crossing was measured."""
    worst: float | None
    """Of 95 % of resampled seeds, by the parabola; None where there is one seed."""
    best: float | None
    """Of 95 % of resampled seeds, by the line."""

    def map(self, change: Callable[[float], float]) -> "Range":
        return Range(
            pessimistic=change(self.pessimistic),
            optimistic=change(self.optimistic),
            worst=None if self.worst is None else change(self.worst),
            best=None if self.best is None else change(self.best),
        )


@dataclass(frozen=True, kw_only=True)
class AtFullQuality:
    """What an entry comes to where it is as good as full tables."""

    parameters: Range
    """Trained ones of all tables."""
    parameter_factor: Range
    """`Σ n·d` over trained parameters: all tables."""
    largest_factor: Range
    """The same for the largest table alone."""
    byte_factor: Range
    """Bytes of full tables over those of tables and pointers."""
    host_bytes: Range
    """Pointers of maps."""
    accelerator_bytes: Range
    """Tables, and pointers that live beside them."""


@dataclass(frozen=True, kw_only=True)
class Compression:
    """Whether and where an entry is as good as full tables."""

    name: str
    method: str
    state: State
    found: AtFullQuality | None
    """None for `one cap`."""
    runs: tuple[str, ...]
    """Of the curve."""
    full_runs: tuple[str, ...]
    """Of the full tables."""


class SizeLine:
    """What an entry takes between the caps that were run and beyond them, by the trained parameters of all tables.

    Bytes of tables and parameters of the largest table are taken to be linear between caps and beyond the last, as they
    are while the same tables are compressed; bytes of pointers to be those of the next larger cap, or of the last. For
    `inf` parameters, all but the pointers are `inf`.
    """

    def __init__(self, points: Sequence[SeedGroup]) -> None:
        by_parameters = {point.sizes.parameters: point for point in points}
        self._points = [by_parameters[parameters] for parameters in sorted(by_parameters)]
        self._parameters = np.array(sorted(by_parameters), np.float64)

    def largest_parameters(self, parameters: float) -> float:
        """Of the largest table."""
        return self._linear(lambda point: point.first.largest_parameters, parameters)

    def host_bytes(self, parameters: float) -> float:
        """Of pointers in host memory."""
        return self._next(parameters).pointer_bytes

    def accelerator_bytes(self, parameters: float) -> float:
        """Of tables, and of pointers that live beside them."""
        tables = self._linear(lambda point: point.sizes.table_bytes, parameters)
        return tables + self._next(parameters).device_pointer_bytes

    def total_bytes(self, parameters: float) -> float:
        return self.accelerator_bytes(parameters) + self.host_bytes(parameters)

    def _next(self, parameters: float) -> Sizes:
        at = int(np.searchsorted(self._parameters, parameters * (1 - 1e-9)))  # a logarithm and back is not exact
        return self._points[min(at, len(self._points) - 1)].sizes

    def _linear(self, size: Callable[[SeedGroup], float], parameters: float) -> float:
        sizes = np.array([size(point) for point in self._points], np.float64)
        if len(sizes) == 1:
            return float(sizes[0] * parameters / self._parameters[0])
        at = int(np.clip(np.searchsorted(self._parameters, parameters), 1, len(sizes) - 1))
        (left, right), (low, high) = self._parameters[at - 1 : at + 1], sizes[at - 1 : at + 1]
        return float(low + (parameters - left) * (high - low) / (right - left)) if np.isfinite(parameters) else np.inf


def compression(curve: Curve, full: SeedGroup) -> Compression:
    """Where `curve` meets the mean test BCE of the full tables, over the trained parameters of all tables."""
    losses: dict[int, list[float]] = {}
    for point in curve.points:
        losses.setdefault(point.sizes.parameters, []).extend(trial.test_bce for trial in point.trials)
    state, parameters = _crossing(losses, [trial.test_bce for trial in full.trials])
    first, takes = curve.points[0], SizeLine(curve.points)

    def factor(total: float, size: Callable[[float], float]) -> Range:
        assert parameters is not None
        return parameters.map(lambda at: total / size(at))

    found = None
    if parameters is not None:
        found = AtFullQuality(
            parameters=parameters,
            parameter_factor=factor(first.sizes.full_parameters, lambda at: at),
            largest_factor=factor(first.first.largest_full_parameters, takes.largest_parameters),
            byte_factor=factor(first.sizes.full_bytes, takes.total_bytes),
            host_bytes=parameters.map(takes.host_bytes),
            accelerator_bytes=parameters.map(takes.accelerator_bytes),
        )
    return Compression(
        name=curve.name, method=curve.method, state=state, found=found, runs=curve.runs, full_runs=full.runs
    )


def _crossing(losses: Mapping[int, Sequence[float]], baseline: Sequence[float]) -> tuple[State, Range | None]:
    if len(losses) == 1:
        ((parameters, values),) = losses.items()
        if np.mean(values) > np.mean(baseline):
            return "one cap", None
        # Nothing can be interpolated, and resampled seeds could only deny it.
        return "smallest cap", Range(pessimistic=parameters, optimistic=parameters, worst=None, best=None)
    means = {parameters: float(np.mean(values)) for parameters, values in losses.items()}
    found = crossing(means, float(np.mean(baseline)))
    worst = best = None
    if max(len(values) for values in (*losses.values(), baseline)) > 1:
        drawn = resample(losses, baseline, resamples=_RESAMPLES)
        worst = float(np.quantile([resampled.pessimistic for resampled in drawn], 1 - _TAIL, method="nearest"))
        best = float(np.quantile([resampled.optimistic for resampled in drawn], _TAIL, method="nearest"))
    state: State = "measured" if found.is_measured else "extrapolated"
    if found.is_smallest:
        state = "smallest cap"
    elif math.isinf(found.optimistic):
        state = "never"
    return state, Range(pessimistic=found.pessimistic, optimistic=found.optimistic, worst=worst, best=best)
