"""Quality against size: Figures 4 and 9 of the paper, family by family, and Figures 8 and 10."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from torchrec_cce.experiments.chart import Chart, Series, visible_range
from torchrec_cce.experiments.curve import Curve, Point, compressed, full_table
from torchrec_cce.experiments.family import overview, panels
from torchrec_cce.experiments.outcome import Spread
from torchrec_cce.experiments.strategy import Strategies

Metric = Literal["BCE", "AUC"]
_FIGURES: dict[tuple[Metric, bool], str] = {
    ("BCE", False): "Figure 4",
    ("AUC", False): "Figure 9",
    ("BCE", True): "Figure 8",
    ("AUC", True): "Figure 10",
}
_PARAMETERS = "trained parameters of all tables"


def quality_charts(curves: Sequence[Curve], metric: Metric) -> list[Chart]:
    """One chart with a method of each kind, and one for each family. A family has the first CCE entry beside it."""
    full, shown = full_table(curves), compressed(curves)
    if not shown:
        return []
    reference = next((curve for curve in shown if curve.method == "cce"), None)
    groups = {"a method of each kind": overview(shown), **panels(shown)}
    charts = []
    for number, (title, members) in enumerate((item for item in groups.items() if item[1]), start=1):
        guide = [] if reference is None or reference in members else [reference]
        charts.append(
            _chart(
                name=f"{metric.lower()}-{number}",
                what=f"{_FIGURES[metric, False]}, {title}",
                metric=metric,
                curves={curve.name: curve for curve in members},
                guide=guide,
                full=full,
            )
        )
    return charts


def strategy_charts(groups: Sequence[Strategies], full: Point | None, metric: Metric) -> list[Chart]:
    """One chart for each group of CCE entries that differ in their clusterings only."""
    return [
        _chart(
            name=f"clusterings-{metric.lower()}-{number}",
            what=f"{_FIGURES[metric, True]}, {group.title}",
            metric=metric,
            curves=group.curves,
            guide=[],
            full=full,
        )
        for number, group in enumerate(groups, start=1)
    ]


def _chart(
    *, name: str, what: str, metric: Metric, curves: dict[str, Curve], guide: Sequence[Curve], full: Point | None
) -> Chart:
    series = [_series(label, curve, metric) for label, curve in curves.items()]
    series += [replace(_series(curve.name, curve, metric), style="reference") for curve in guide]
    if full is not None:
        level = _spread(full, metric)
        deviation = (level.deviation,)
        series.append(
            Series(label=full.first.name, y=(level.mean,), deviation=deviation, style="level", runs=(full.runs,))
        )
    caption = f"{what}: test {metric} against {_PARAMETERS}; bars are one standard deviation over seeds"
    if full is not None:
        caption += f"; dashed, full tables: {_spread(full, metric).mean:.5f}, {full.first.parameters:,} parameters"
    if guide:
        caption += f"; grey line, {guide[0].name}, as a guide"
    return Chart(
        name=name,
        caption=caption,
        x_label=_PARAMETERS,
        y_label=f"test {metric}",
        series=tuple(series),
        log_x=True,
        y_range=visible_range(series, lower_is_better=metric == "BCE"),
    )


def _series(label: str, curve: Curve, metric: Metric) -> Series:
    spreads = [_spread(point, metric) for point in curve.points]
    return Series(
        label=label,
        x=tuple(float(point.first.parameters) for point in curve.points),
        y=tuple(spread.mean for spread in spreads),
        deviation=tuple(spread.deviation for spread in spreads),
        runs=tuple(point.runs for point in curve.points),
    )


def _spread(point: Point, metric: Metric) -> Spread:
    return point.test_bce if metric == "BCE" else point.test_auc
