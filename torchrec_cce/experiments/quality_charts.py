"""Quality against size: Figures 4 and 9 of the paper, family by family, and Figures 8 and 10.

What is drawn together, so that a panel can be read, are families of methods, and strategies for CCE: entries that
differ in nothing but when and how they are clustered (Appendix E).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torchrec_cce.charts.chart import Chart, Series, in_panels, visible_range
from torchrec_cce.experiments.curve import FULL, Curve, MeanDeviation, SeedGroup, compressed, full_table
from torchrec_cce.methods.registry import FAMILIES

Metric = Literal["BCE", "AUC"]
METRICS: tuple[Metric, ...] = get_args(Metric)
Size = Literal["parameters", "total_bytes", "training_bytes"]
_FIGURES: dict[tuple[Metric, bool], str] = {
    ("BCE", False): "Figure 4",
    ("AUC", False): "Figure 9",
    ("BCE", True): "Figure 8",
    ("AUC", True): "Figure 10",
}
_SIZES: dict[Size, str] = {
    "parameters": "trained parameters of all tables",
    "total_bytes": "bytes of tables and pointers",
    "training_bytes": "bytes held while training",
}
OVERVIEW = ("hashing_trick", "hash_embeddings", "ce_concat", "dhe", "robe", "tensor_train", "pq", "cce")
"""A method of each kind: those of Figure 4, and what the paper's authors have in their library."""
_OTHERS = "others"
_VARYING = {"embedding": "max_parameters", "optimizer": "embedding_learning_rate", "derive": "run"}
"""Section → what differs from trial to trial of one entry."""


@dataclass(frozen=True, kw_only=True)
class Strategies:
    """CCE entries that may be compared for their clusterings."""

    title: str
    curves: dict[str, Curve]
    """`ct` and `cf`, and what else differs among the entries → curve; no more than a panel holds."""


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
            full=full,
        )
        for number, group in enumerate(groups, start=1)
    ]


def quality_chart(
    *,
    name: str,
    what: str,
    metric: Metric,
    curves: Mapping[str, Curve],
    full: SeedGroup | None,
    guide: Sequence[Curve] = (),
    size: Size = "parameters",
) -> Chart:
    series = [_series(label, curve, metric, size) for label, curve in curves.items()]
    series += [replace(_series(curve.name, curve, metric, size), style="reference") for curve in guide]
    if full is not None:
        level = _quality(full, metric)
        deviation = (level.deviation,)
        series.append(
            Series(label=full.first.name, y=(level.mean,), deviation=deviation, style="level", runs=(full.runs,))
        )
    caption = f"{what}: test {metric} against {_SIZES[size]}; bars are one standard deviation over seeds"
    if full is not None:
        unit = "parameters" if size == "parameters" else "bytes"
        caption += f"; dashed, full tables: {_quality(full, metric).mean:.5f}, {getattr(full.sizes, size):,} {unit}"
    if guide:
        caption += f"; grey line, {guide[0].name}, as a guide"
    return Chart(
        name=name,
        caption=caption,
        x_label=_SIZES[size],
        y_label=f"test {metric}",
        series=tuple(series),
        log_x=True,
        y_range=visible_range(series, lower_is_better=metric == "BCE"),
    )


def _series(label: str, curve: Curve, metric: Metric, size: Size) -> Series:
    spreads = [_quality(point, metric) for point in curve.points]
    return Series(
        label=label,
        x=tuple(float(getattr(point.sizes, size)) for point in curve.points),
        y=tuple(spread.mean for spread in spreads),
        deviation=tuple(spread.deviation for spread in spreads),
        runs=tuple(point.runs for point in curve.points),
    )


def _quality(point: SeedGroup, metric: Metric) -> MeanDeviation:
    return point.test_bce if metric == "BCE" else point.test_auc


def family_of(method: str) -> str:
    """The name of the family that a method belongs to."""
    return next((name for name, methods in FAMILIES.items() if method in methods), FULL if method == FULL else _OTHERS)


def overview(curves: Sequence[Curve]) -> list[Curve]:
    """Of each method in `OVERVIEW` that was run, the entry that was run first."""
    firsts = {curve.method: curve for curve in reversed(curves)}
    return [firsts[method] for method in OVERVIEW if method in firsts]


def panels(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    """Title → curves that are drawn together: a family, or a part of one that is too large for a panel."""
    families: dict[str, list[Curve]] = {family: [] for family in (*FAMILIES, _OTHERS, FULL)}
    for curve in curves:
        families[family_of(curve.method)].append(curve)
    found: dict[str, list[Curve]] = {}
    for family, members in families.items():
        parts = in_panels(members)
        for number, part in enumerate(parts, start=1):
            found[family if len(parts) == 1 else f"{family}, {number} of {len(parts)}"] = list(part)
    return found


def strategies_of(curves: Sequence[Curve]) -> list[Strategies]:
    """Groups of two entries or more whose configurations are equal but for `[recluster]`, by `ct` and `cf`."""
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        if curve.method == "cce":
            groups.setdefault(_what_else(curve), []).append(curve)
    found = []
    for members in groups.values():
        if len(members) < 2:
            continue
        members.sort(key=lambda curve: (_section(curve).get("ct", 0), _section(curve).get("cf", 0)))
        title = f"{len(members)} ways to cluster {members[0].name}"
        named = list(zip(_names(members), members, strict=True))
        found += [Strategies(title=title, curves=dict(part)) for part in in_panels(named)]
    return found


def _section(curve: Curve) -> dict[str, Any]:
    return curve.points[0].first.config.get("recluster", {})  # type: ignore[no-any-return]


def _what_else(curve: Curve) -> str:
    """The configuration without its clusterings, and without what differs from trial to trial of one entry."""
    config = {name: value for name, value in curve.points[0].first.config.items() if name not in ("recluster", "seed")}
    for section, varying in _VARYING.items():
        values = config.get(section)
        if values is not None:
            config[section] = {name: value for name, value in values.items() if name != varying}
    return json.dumps(config, sort_keys=True)


def _names(members: Sequence[Curve]) -> list[str]:
    sections = [_section(curve) for curve in members]
    every = {name for section in sections for name in section}
    differing = sorted(name for name in every if len({json.dumps(section.get(name)) for section in sections}) > 1)
    shown = ["ct", "cf", *(name for name in differing if name not in ("ct", "cf"))]
    names = [" ".join(f"{name}={section.get(name)}" for name in shown) for section in sections]
    # Two entries with one section, say of a repeated experiment, keep their own names.
    return [
        name if names.count(name) == 1 else f"{name} ({curve.name})" for name, curve in zip(names, members, strict=True)
    ]
