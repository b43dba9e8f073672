"""Loss curves: what an entry comes to at each cap, over seeds."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from torchrec_cce.experiments.outcome import Spread
from torchrec_cce.experiments.results import Result

FULL = "full"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One entry at one cap."""

    trials: tuple[Result, ...]
    """One for each seed; never empty."""

    @property
    def first(self) -> Result:
        """For what all seeds have in common: name, cap, rate and sizes."""
        return self.trials[0]

    @property
    def test_bce(self) -> Spread:
        return _spread(trial.test_bce for trial in self.trials)

    @property
    def test_auc(self) -> Spread:
        return _spread(trial.test_auc for trial in self.trials)

    @property
    def validation_bce(self) -> Spread:
        return _spread(trial.validation_bce for trial in self.trials)

    @property
    def validation_auc(self) -> Spread:
        return _spread(trial.validation_auc for trial in self.trials)

    @property
    def runs(self) -> tuple[str, ...]:
        """The folders of the runs that this is made of."""
        return tuple(trial.run for trial in self.trials)

    @property
    def label(self) -> str:
        return self.first.name if self.first.cap is None else f"{self.first.name} at {self.first.cap:,}"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One entry at all its caps."""

    name: str
    method: str
    points: tuple[Point, ...]
    """By trained parameters, ascending."""

    @property
    def runs(self) -> tuple[str, ...]:
        return tuple(run for point in self.points for run in point.runs)


def curves_of(trials: Sequence[Result]) -> list[Curve]:
    """One curve an entry, in the order of their first trials."""
    groups: dict[str, dict[int | None, list[Result]]] = {}
    for trial in trials:
        groups.setdefault(trial.name, {}).setdefault(trial.cap, []).append(trial)
    found = []
    for name, caps in groups.items():
        points = sorted((Point(trials=tuple(group)) for group in caps.values()), key=lambda one: one.first.parameters)
        found.append(Curve(name=name, method=points[0].first.method, points=tuple(points)))
    return found


def full_table(curves: Sequence[Curve]) -> Point | None:
    """What all are compared with: of the full tables that were run, those with the lowest validation BCE."""
    points = [point for curve in curves if curve.method == FULL for point in curve.points]
    return min(points, key=_validation_loss, default=None)


def compressed(curves: Sequence[Curve]) -> list[Curve]:
    """All but the full tables."""
    return [curve for curve in curves if curve.method != FULL]


def _validation_loss(point: Point) -> float:
    loss = point.validation_bce.mean
    return math.inf if math.isnan(loss) else loss


def _spread(values: Iterable[float]) -> Spread:
    found = np.array(list(values))
    deviation = float(found.std(ddof=1)) if len(found) > 1 else 0.0
    return Spread(mean=float(found.mean()), deviation=deviation)
