"""How the pointers of the largest table are spread, beside those of a hash and of product quantization (Appendix G)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torchrec import EmbeddingBagConfig

from torchrec_cce.charts.chart import Chart, Series, in_panels
from torchrec_cce.clustering.entropy import Verdict, verdict
from torchrec_cce.errors import DataFileError
from torchrec_cce.experiments.curve import Curve, SeedGroup
from torchrec_cce.methods.registry import METHODS, tables_under_cap
from torchrec_cce.methods.table import CompressedConfig
from torchrec_cce.training.metrics import METRICS


@dataclass(frozen=True, kw_only=True)
class LargestTable:
    """The largest table of a run, if its method learns pointers: what entropies and the width of pointers are of."""

    name: str
    num_ids: int
    num_columns: int
    """`c`."""
    num_rows: int
    """`k`."""
    pointer_bits: int
    """Of one stored pointer."""


@dataclass(frozen=True, kw_only=True)
class Collapse:
    """How the pointers of the largest table are spread, for one entry under one cap."""

    name: str
    method: str
    max_parameters: int | None
    table: LargestTable | None
    """None if the configuration does not say: then there is no verdict."""
    entropies: tuple[float, ...]
    """`H1 … Hc` in nats, mean over seeds."""
    random: tuple[float, ...]
    """The same for random pointers."""
    pq: tuple[float, ...] | None
    """The same for product quantization of the trained full table with as many rows and columns; None if it was not
    run."""
    verdict: Verdict | None
    runs: tuple[str, ...]
    pq_runs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class EntropyHistory:
    """How the pointers of the largest table were spread after each clustering, for one entry under one cap."""

    label: str
    steps: tuple[int, ...]
    """Batches before each clustering."""
    shares: tuple[tuple[float, ...], ...]
    """[clusterings, min(c, 2)] H1 and H2 as shares of those of random pointers, mean over seeds."""
    runs: tuple[str, ...]


def largest_table(config: Mapping[str, Any]) -> LargestTable | None:
    """The largest table of a run's configuration; None if it has no learned pointers, or none is named."""
    sizes = {name: int(table["num_embeddings"]) for name, table in config.get("tables", {}).items()}
    section = config.get("embedding", {})
    if not sizes or section.get("method") not in METHODS or section["method"] == "full":
        return None
    name = max(sizes, key=lambda table: sizes[table])
    (table,) = tables_under_cap(
        [EmbeddingBagConfig(name=name, num_embeddings=sizes[name], embedding_dim=section["dim"], feature_names=[name])],
        method=section["method"],
        max_parameters=section["max_parameters"],
        num_columns=section.get("num_columns", 4),
        num_terms=section.get("num_terms"),
        use_helper=section.get("use_helper", True),
        min_pointer_bits=section.get("min_pointer_bits", 8),
    )
    if not isinstance(table, CompressedConfig) or table.pointer_bits is None:
        return None
    return LargestTable(
        name=name,
        num_ids=sizes[name],
        num_columns=table.num_columns,
        num_rows=table.num_rows,
        pointer_bits=table.pointer_bits,
    )


def collapses(curves: Sequence[Curve]) -> list[Collapse]:
    """One for each entry and cap whose largest table has learned pointers."""
    points = [
        point
        for curve in curves
        for point in curve.points
        if all(trial.largest_entropies.learned for trial in point.trials)
    ]
    tables = [largest_table(point.first.config) for point in points]
    quantized: dict[tuple[int, int], SeedGroup] = {}
    for point, table in zip(points, tables, strict=True):
        if table is not None and _is_quantized(point):
            quantized.setdefault((table.num_rows, table.num_columns), point)
    found = []
    for point, table in zip(points, tables, strict=True):
        pq = None if table is None else quantized.get((table.num_rows, table.num_columns))
        pq = None if pq is point else pq
        entropies, random = _mean(point), point.first.largest_entropies.random
        beside = None if pq is None else _mean(pq)
        found.append(
            Collapse(
                name=point.first.name,
                method=point.first.method,
                max_parameters=point.first.max_parameters,
                table=table,
                entropies=entropies,
                random=random,
                pq=beside,
                verdict=None
                if table is None or not random
                else verdict(entropies, random, num_ids=table.num_ids, num_rows=table.num_rows, pq=beside),
                runs=point.runs,
                pq_runs=() if pq is None else pq.runs,
            )
        )
    return found


def entropy_histories(curves: Sequence[Curve], runs: Path) -> list[EntropyHistory]:
    """Of every CCE entry under its largest cap, as far as the folders of its runs are in `runs`."""
    found = []
    for curve in curves:
        clustered = [
            point for point in curve.points if point.first.method == "cce" and point.first.largest_entropies.random
        ]
        history = _history(clustered[-1], runs) if clustered else None
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
                random = Series(label="random pointers", y=(1.0,), style="level")
                chart = Chart(
                    name=f"entropy-h{m}-{number}",
                    caption=f"H{m} of the largest table's pointers after each clustering, as a share of that of random "
                    "pointers (dashed); mean over seeds, each entry at its largest cap",
                    x_label="batches",
                    y_label=f"H{m} over that of random pointers",
                    series=(*series, random),
                    whole_x=True,
                )
                charts.append(chart)
    return charts


def read_metrics(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind that a run wrote; empty where there is no file. Raises DataFileError if it is damaged."""
    try:
        lines = (run_dir / METRICS).read_text().splitlines()
    except OSError:
        return []
    try:
        return [record for record in map(json.loads, lines) if record["kind"] == kind]
    except (ValueError, TypeError, KeyError) as error:
        raise DataFileError(f"{run_dir / METRICS}: damaged ({error}); run the trial again") from error


def _is_quantized(point: SeedGroup) -> bool:
    """Whether these are pointers of product quantization as it is meant."""
    return point.first.method == "pq" and not (point.first.config.get("derive") or {}).get("circular", False)


def _mean(point: SeedGroup) -> tuple[float, ...]:
    return tuple(np.mean([trial.largest_entropies.learned for trial in point.trials], axis=0).tolist())


def _history(point: SeedGroup, runs: Path) -> EntropyHistory | None:
    table = largest_table(point.first.config)
    if table is None:
        return None
    by_run = {}
    for run in point.runs:
        records = [record for record in read_metrics(runs / run, "recluster") if record.get("table") == table.name]
        if records:
            by_run[run] = {record["step"]: record["entropies"] for record in records}
    # Seeds may stop early, and then have fewer clusterings.
    steps = sorted(set.intersection(*map(set, by_run.values()))) if by_run else []
    if not steps:
        return None
    random = np.array(point.first.largest_entropies.random[:2])
    shares = [np.mean([entropies[step][:2] for entropies in by_run.values()], axis=0) / random for step in steps]
    return EntropyHistory(
        label=point.label,
        steps=tuple(steps),
        shares=tuple(tuple(share.tolist()) for share in shares),
        runs=tuple(by_run),
    )
