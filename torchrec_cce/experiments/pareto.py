"""What to configure for a budget of bytes: entries that no other beats in both size and quality."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torchrec_cce.charts.chart import Chart, Series, Style, visible_range
from torchrec_cce.errors import ConfigError
from torchrec_cce.experiments.curve import MeanDeviation, SeedGroup, curves_of
from torchrec_cce.experiments.entropies import LargestTable, largest_table
from torchrec_cce.experiments.quality_charts import METRICS, Metric, family_of
from torchrec_cce.experiments.results import TrialResult

Budget = Literal["total_bytes", "training_bytes"]
_BUDGETS: dict[Budget, tuple[str, str]] = {
    "total_bytes": ("the bytes of tables and pointers, host and accelerator together", "bytes of tables and pointers"),
    "training_bytes": (
        "the most bytes that are held while training: tables, the state of their optimizer, rows of residents, "
        "pointers and frequencies",
        "bytes held while training",
    ),
}
"""What is to be kept small: for a caption, and for an axis."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One entry under one cap: what it takes and what it gives."""

    name: str
    method: str
    max_parameters: int | None
    learning_rate: float
    """Of the embedding tables."""
    settings: dict[str, dict[str, Any]]
    """The sections of a run that make it: `embedding`, `optimizer`, for CCE `recluster`, `derive` if it has one."""
    largest: LargestTable | None
    """Columns, rows and pointer width of the largest table, where it has learned pointers."""
    validation_auc: float
    """Mean over seeds: what is chosen by. NaN is never chosen."""
    auc: MeanDeviation
    """On the test split, like the BCE; by neither anything is chosen."""
    bce: MeanDeviation
    table_bytes: int
    pointer_bytes: int
    """In host memory."""
    device_pointer_bytes: int
    total_bytes: int
    training_bytes: int
    """0 where nobody said."""
    runs: tuple[str, ...]

    @property
    def accelerator_bytes(self) -> int:
        """Of tables, and of pointers that live beside them."""
        return self.table_bytes + self.device_pointer_bytes

    @property
    def label(self) -> str:
        return self.name if self.max_parameters is None else f"{self.name} at {self.max_parameters:,}"

    def to_toml(self) -> str:
        """The sections to configure, for a run's file."""
        lines = []
        for section, values in self.settings.items():
            # A JSON number, string or boolean is one of TOML.
            given = [f"{name} = {json.dumps(value)}" for name, value in values.items() if value is not None]
            lines += [f"[{section}]", *given, ""]
        return "\n".join(lines)


def candidates_of(results: Sequence[TrialResult]) -> list[Candidate]:
    """One for each entry and cap of the trials at their chosen rates, full tables among them."""
    chosen = [result for result in results if result.chosen]
    return [_candidate(point) for curve in curves_of(chosen) for point in curve.points]


def pareto_front(candidates: Sequence[Candidate], budget: Budget = "total_bytes") -> list[Candidate]:
    """The candidates with a higher validation AUC than every other of at most their bytes; by bytes, ascending.

    Of several with equal bytes and equal AUC, the first stays.
    """
    known = [candidate for candidate in candidates if not math.isnan(candidate.validation_auc)]
    front: list[Candidate] = []
    for candidate in sorted(known, key=lambda candidate: (getattr(candidate, budget), -candidate.validation_auc)):
        if not front or candidate.validation_auc > front[-1].validation_auc:
            front.append(candidate)
    return front


def advise(results: Sequence[TrialResult], *, max_bytes: int) -> Candidate:
    """The entry to configure: the highest validation AUC among those whose tables and pointers fit in `max_bytes`.

    Raises:
        ConfigError: nothing was run, or nothing fits; the message names the smallest.
    """
    front = pareto_front(candidates_of(results))
    if not front:
        raise ConfigError("there is no finished trial at a tuned rate to choose from; run the experiment first")
    fitting = [candidate for candidate in front if candidate.total_bytes <= max_bytes]
    if not fitting:
        smallest = front[0]
        raise ConfigError(
            f"max_bytes={max_bytes:,} is too little for everything that was run; the smallest is {smallest.label}, "
            f"{smallest.total_bytes:,} bytes with its pointers"
        )
    return fitting[-1]


def budget_charts(candidates: Sequence[Candidate]) -> list[Chart]:
    """Test AUC and BCE against bytes that are served, and against bytes that are held while training."""
    return [
        pareto_chart(known, metric, budget)
        for budget in _BUDGETS
        for metric in METRICS
        if (known := [candidate for candidate in candidates if getattr(candidate, budget)])
    ]


def pareto_chart(candidates: Sequence[Candidate], metric: Metric, budget: Budget) -> Chart:
    """A test metric against bytes: everything by family, and what validation AUC puts on the front, joined."""
    families: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        families.setdefault(family_of(candidate.method), []).append(candidate)
    series = [_series(family, members, metric, budget) for family, members in families.items()]
    front = _series("front", pareto_front(candidates, budget), metric, budget, style="reference")
    caption, label = _BUDGETS[budget]
    return Chart(
        name="pareto" if (metric, budget) == ("AUC", "total_bytes") else f"pareto-{metric.lower()}-{budget}",
        caption=f"Test {metric} against {caption}. The line joins what no other entry beats in both bytes and "
        f"validation AUC; as it is drawn in test {metric} it may turn back",
        x_label=label,
        y_label=f"test {metric}",
        series=(*series, front),
        log_x=True,
        y_range=visible_range(series, lower_is_better=metric == "BCE"),
    )


def _candidate(point: SeedGroup) -> Candidate:
    first = point.first
    sections = ("embedding", "optimizer", "recluster") if first.method == "cce" else ("embedding", "optimizer")
    return Candidate(
        name=first.name,
        method=first.method,
        max_parameters=first.max_parameters,
        learning_rate=first.learning_rate,
        settings={name: first.config[name] for name in (*sections, "derive") if first.config.get(name)},
        largest=largest_table(first.config),
        validation_auc=point.validation_auc.mean,
        auc=point.test_auc,
        bce=point.test_bce,
        table_bytes=point.sizes.table_bytes,
        pointer_bytes=point.sizes.pointer_bytes,
        device_pointer_bytes=point.sizes.device_pointer_bytes,
        total_bytes=point.sizes.total_bytes,
        training_bytes=point.sizes.training_bytes,
        runs=point.runs,
    )


def _series(
    label: str, members: Sequence[Candidate], metric: Metric, budget: Budget, *, style: Style = "points"
) -> Series:
    return Series(
        label=label,
        x=tuple(float(getattr(candidate, budget)) for candidate in members),
        y=tuple((candidate.auc if metric == "AUC" else candidate.bce).mean for candidate in members),
        style=style,
        runs=tuple(candidate.runs for candidate in members),
    )
