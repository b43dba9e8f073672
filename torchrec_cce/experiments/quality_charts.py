"""Quality against size: Figures 4 and 9 of the paper, family by family, and Figures 8 and 10."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from torchrec_cce.charts.chart import Chart, Series, visible_range
from torchrec_cce.experiments.curve import Curve, MeanDeviation, SeedGroup, compressed, full_table
from torchrec_cce.experiments.family import Strategies, overview, panels

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
            quality_chart(
                name=f"{metric.lower()}-{number}",
                what=f"{_FIGURES[metric, False]}, {title}",
                metric=metric,
                curves={curve.name: curve for curve in members},
                guide=guide,
                full=full,
            )
        )
    return charts


def strategy_charts(groups: Sequence[Strategies], full: SeedGroup | None, metric: Metric) -> list[Chart]:
    """One chart for each group of CCE entries that differ in their clusterings only."""
    return [
        quality_chart(
            name=f"clusterings-{metric.lower()}-{number}",
            what=f"{_FIGURES[metric, True]}, {group.title}",
            metric=metric,
            curves=group.curves,
            guide=[],
            full=full,
        )
        for number, group in enumerate(groups, start=1)
    ]


def quality_chart(
    *, name: str, what: str, metric: Metric, curves: dict[str, Curve], guide: Sequence[Curve], full: SeedGroup | None
) -> Chart:
    series = [_series(label, curve, metric) for label, curve in curves.items()]
    series += [replace(_series(curve.name, curve, metric), style="reference") for curve in guide]
    if full is not None:
        level = _quality(full, metric)
        deviation = (level.deviation,)
        series.append(
            Series(label=full.first.name, y=(level.mean,), deviation=deviation, style="level", runs=(full.runs,))
        )
    caption = f"{what}: test {metric} against {_PARAMETERS}; bars are one standard deviation over seeds"
    if full is not None:
        caption += f"; dashed, full tables: {_quality(full, metric).mean:.5f}, {full.sizes.parameters:,} parameters"
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
    spreads = [_quality(point, metric) for point in curve.points]
    return Series(
        label=label,
        x=tuple(float(point.sizes.parameters) for point in curve.points),
        y=tuple(spread.mean for spread in spreads),
        deviation=tuple(spread.deviation for spread in spreads),
        runs=tuple(point.runs for point in curve.points),
    )


def _quality(point: SeedGroup, metric: Metric) -> MeanDeviation:
    return point.test_bce if metric == "BCE" else point.test_auc
