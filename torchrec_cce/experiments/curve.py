"""Means over seeds, and curves of them: what an entry comes to under each cap."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchrec_cce.experiments.results import TrialResult
from torchrec_cce.training.model import Sizes

FULL = "full"
_ROUNDING = 1e-12
"""Equal values may differ from their mean by this much."""


@dataclass(frozen=True, kw_only=True)
class MeanDeviation:
    """Mean and sample standard deviation over seeds."""

    mean: float
    """NaN for no values."""
    deviation: float
    """0 for a single seed."""

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.deviation:.4f}" if self.deviation > _ROUNDING else f"{self.mean:.4f}"

    @classmethod
    def of(cls, values: Iterable[float]) -> "MeanDeviation":
        """NaN if a value is."""
        found = np.array(list(values))
        return cls(
            mean=float(found.mean()) if len(found) else math.nan,
            deviation=float(found.std(ddof=1)) if len(found) > 1 else 0.0,
        )


@dataclass(frozen=True, kw_only=True)
class SeedGroup:
    """The trials of one entry under one cap, at one learning rate, that differ in nothing but their seeds."""

    trials: tuple[TrialResult, ...]
    """One for each seed; never empty, and all were trained."""

    @property
    def first(self) -> TrialResult:
        """For what all seeds have in common: name, method, cap, learning rate, configuration."""
        return self.trials[0]

    @property
    def sizes(self) -> Sizes:
        """Of the first seed, like those of all others."""
        assert self.first.sizes is not None
        return self.first.sizes

    @property
    def test_bce(self) -> MeanDeviation:
        """Of the seeds that did not diverge."""
        return MeanDeviation.of(trial.test_bce for trial in self.trials if not math.isnan(trial.test_bce))

    @property
    def test_auc(self) -> MeanDeviation:
        """Of the seeds that did not diverge."""
        return MeanDeviation.of(trial.test_auc for trial in self.trials if not math.isnan(trial.test_auc))

    @property
    def validation_bce(self) -> MeanDeviation:
        return MeanDeviation.of(trial.validation_bce for trial in self.trials)

    @property
    def validation_auc(self) -> MeanDeviation:
        return MeanDeviation.of(trial.validation_auc for trial in self.trials)

    @property
    def runs(self) -> tuple[str, ...]:
        """The folders of the runs that this is made of."""
        return tuple(trial.run for trial in self.trials if trial.run is not None)

    @property
    def label(self) -> str:
        name, max_parameters = self.first.name, self.first.max_parameters
        return name if max_parameters is None else f"{name} at {max_parameters:,}"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One entry under all its caps."""

    name: str
    method: str
    points: tuple[SeedGroup, ...]
    """By trained parameters, ascending."""

    @property
    def is_full(self) -> bool:
        """Whether it is of full tables as they were trained."""
        derived: dict[str, Any] = self.points[0].first.config.get("derive") or {}
        return self.method == FULL and derived.get("bits") is None

    @property
    def runs(self) -> tuple[str, ...]:
        return tuple(run for point in self.points for run in point.runs)


def seed_groups(results: Iterable[TrialResult]) -> list[SeedGroup]:
    """One group for each entry and cap, in the order of their first results."""
    groups: dict[tuple[str, int | None], list[TrialResult]] = {}
    for result in results:
        groups.setdefault((result.name, result.max_parameters), []).append(result)
    return [SeedGroup(trials=tuple(group)) for group in groups.values()]


def curves_of(results: Iterable[TrialResult]) -> list[Curve]:
    """One curve for each entry, in the order of their first results."""
    by_name: dict[str, list[SeedGroup]] = {}
    for group in seed_groups(results):
        by_name.setdefault(group.first.name, []).append(group)
    curves = []
    for name, groups in by_name.items():
        points = tuple(sorted(groups, key=lambda group: group.sizes.parameters))
        curves.append(Curve(name=name, method=points[0].first.method, points=points))
    return curves


def full_table(curves: Sequence[Curve]) -> SeedGroup | None:
    """What all are compared with: of the full tables that were run, those with the lowest validation BCE."""
    points = [point for curve in curves if curve.is_full for point in curve.points]
    known = [point for point in points if not math.isnan(point.validation_bce.mean)]
    return min(known or points, key=lambda point: point.validation_bce.mean, default=None)


def compressed(curves: Sequence[Curve]) -> list[Curve]:
    """All but the full tables."""
    return [curve for curve in curves if not curve.is_full]
