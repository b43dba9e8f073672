"""Entropies over the clusterings of a run, from its metrics."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from torchrec_cce.experiments.chart import Chart, Series, in_panels
from torchrec_cce.experiments.curve import Curve, Point
from torchrec_cce.experiments.largest_table import largest_table

_METRICS = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class EntropyHistory:
    """Of the largest table of one entry at one cap, mean over seeds."""

    label: str
    steps: tuple[int, ...]
    """Batches before each clustering."""
    shares: tuple[tuple[float, ...], ...]
    """[clusterings, min(c, 2)] H1 and H2 as shares of those of random pointers."""
    runs: tuple[str, ...]


def entropy_histories(curves: Sequence[Curve], folder: Path) -> list[EntropyHistory]:
    """Of every CCE entry at its largest cap, as far as the folders of its runs are in `folder`."""
    found = []
    for curve in curves:
        clustered = [point for point in curve.points if point.first.method == "cce" and point.first.random_entropies]
        history = _history(clustered[-1], folder) if clustered else None
        if history is not None:
            found.append(history)
    return found


def entropy_charts(histories: Sequence[EntropyHistory]) -> list[Chart]:
    """H1 and H2 over the clusterings, for no more entries a chart than can be told apart."""
    charts = []
    for number, shown in enumerate(in_panels(histories), start=1):
        for m in (1, 2):
            series = [
                Series(
                    label=history.label,
                    x=tuple(float(step) for step in history.steps),
                    y=tuple(shares[m - 1] for shares in history.shares),
                    runs=(history.runs,) * len(history.steps),
                )
                for history in shown
                if len(history.shares[0]) >= m
            ]
            if series:
                charts.append(_chart(f"entropy-h{m}-{number}", m, series))
    return charts


def _chart(name: str, m: int, series: Sequence[Series]) -> Chart:
    return Chart(
        name=name,
        caption=f"H{m} of the largest table's pointers after each clustering, as a share of that of random pointers "
        "(dashed); mean over seeds, each entry at its largest cap",
        x_label="batches",
        y_label=f"H{m} over that of random pointers",
        series=(*series, Series(label="random pointers", y=(1.0,), style="level")),
        whole_x=True,
    )


def _history(point: Point, folder: Path) -> EntropyHistory | None:
    table = largest_table(point.first.config)
    if table is None:
        return None
    by_run = {run: records for run in point.runs if (records := _read(folder / run / _METRICS, table.name))}
    if not by_run:
        return None
    # Seeds may stop early, and then have fewer clusterings.
    steps = sorted(set.intersection(*(set(records) for records in by_run.values())))
    if not steps:
        return None
    random = np.array(point.first.random_entropies[:2])
    shares = [np.mean([records[step][:2] for records in by_run.values()], axis=0) / random for step in steps]
    return EntropyHistory(
        label=point.label,
        steps=tuple(steps),
        shares=tuple(tuple(share.tolist()) for share in shares),
        runs=tuple(by_run),
    )


def _read(path: Path, table: str) -> dict[int, list[float]]:
    """Step → entropies of a table; empty where there is no file."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    records = [json.loads(line) for line in lines]
    return {
        record["step"]: record["entropies"]
        for record in records
        if record["kind"] == "recluster" and record.get("table") == table
    }
