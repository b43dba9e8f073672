"""How many times smaller than full tables a method is where its loss curve meets theirs: Table 1 of the paper, and the
bytes that it leaves out."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from torchrec_cce.experiments.crossing import Crossing, crossing, resample
from torchrec_cce.experiments.curve import Curve, SeedGroup
from torchrec_cce.training.sizes import Sizes

State = Literal["measured", "smallest cap", "extrapolated", "never", "one cap"]
"""How the curve meets the loss of full tables: between two caps; at the smallest cap already, so that a smaller one may
do; beyond the largest; not even by a straight line; or there is only one cap, whose loss is higher."""

_RESAMPLES = 1000
_TAIL = 0.025


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
    return _state(found), Range(pessimistic=found.pessimistic, optimistic=found.optimistic, worst=worst, best=best)


def _state(found: Crossing) -> State:
    if found.is_smallest:
        return "smallest cap"
    if math.isinf(found.optimistic):
        return "never"
    return "measured" if found.is_measured else "extrapolated"
