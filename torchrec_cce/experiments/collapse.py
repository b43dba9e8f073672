"""Entropies of learned pointers beside those of a hash and of product quantization (Appendix G)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from torchrec_cce.clustering.entropy import Verdict, verdict
from torchrec_cce.experiments.curve import Curve, Point
from torchrec_cce.experiments.largest_table import LargestTable, largest_table

Entropies = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Collapse:
    """How the pointers of the largest table are spread, for one entry at one cap."""

    name: str
    method: str
    cap: int | None
    table: LargestTable | None
    """None if the configuration does not say: then there is no verdict."""
    entropies: Entropies
    """`H1 … Hc` in nats, mean over seeds."""
    random: Entropies
    """Of random pointers."""
    pq: Entropies | None
    """Of product quantization of the trained full table with as many rows and columns; None if it was not run."""
    verdict: Verdict | None
    runs: tuple[str, ...]
    pq_runs: tuple[str, ...]


def collapses(curves: Sequence[Curve]) -> list[Collapse]:
    """One for each entry and cap whose largest table has learned pointers."""
    points = [point for curve in curves for point in curve.points if all(trial.entropies for trial in point.trials)]
    tables = [largest_table(point.first.config) for point in points]
    quantized: dict[tuple[int, int], Point] = {}
    for point, table in zip(points, tables, strict=True):
        if table is not None and _is_quantized(point):
            quantized.setdefault((table.num_rows, table.num_columns), point)
    found = []
    for point, table in zip(points, tables, strict=True):
        pq = None if table is None else quantized.get((table.num_rows, table.num_columns))
        pq = None if pq is point else pq
        found.append(_collapse(point, table, pq))
    return found


def _collapse(point: Point, table: LargestTable | None, pq: Point | None) -> Collapse:
    first = point.first
    entropies, random = _mean(point), first.random_entropies
    beside = None if pq is None else _mean(pq)
    return Collapse(
        name=first.name,
        method=first.method,
        cap=first.cap,
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


def _is_quantized(point: Point) -> bool:
    """Whether these are pointers of product quantization as it is meant."""
    return point.first.method == "pq" and not (point.first.config.get("derive") or {}).get("circular", False)


def _mean(point: Point) -> Entropies:
    return tuple(np.mean([trial.entropies for trial in point.trials], axis=0).tolist())
