"""What a clustering must pass before it is published: pure functions on its figures.

docs/operations.md says what each gate means, and what to do when one stays closed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torchrec_cce.clustering.entropy import h1_share, h2_gain, learned_share, random_entropies
from torchrec_cce.jobs.recluster.thresholds import Thresholds

_ROUNDING = 1e-6
"""Distances below this share of the variance are those of embeddings that their words give exactly."""


@dataclass(frozen=True, kw_only=True)
class TableFigures:
    """What a clustering did to one table."""

    table: str
    num_ids: int
    num_columns: int
    num_rows: int
    generation: int
    """Of the new map: clusterings so far."""
    entropies: tuple[float, ...]
    """`H1 … Hc` of the new pointers, in nats."""
    error: float
    """Mean over the IDs that trained of the squared distance from an embedding to its new words."""
    parent_error: float
    """The same to the means of the clusters of the map before: its best on today's embeddings."""
    variance: float
    """The same to the mean of all embeddings."""
    churn: float
    """Share of the pointers that differ from the map before, whose clusters keep their numbers where they can."""
    unseen: float | None
    """Share of the IDs that were never seen; None if nobody counted."""

    @property
    def random_entropies(self) -> tuple[float, ...]:
        """`H1 … Hc` of pointers by hashes, in nats."""
        return random_entropies(self.num_ids, self.num_rows, self.num_columns)


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One figure and what it must be."""

    threshold: str
    """The field of `Thresholds`, whose name begins with `min_` or `max_`."""
    table: str | None
    """None for a figure of the whole model."""
    value: float | None
    """None where it says nothing; the gate is then open."""
    bound: float
    passed: bool
    note: str = ""
    """Why there is no value."""


def judge(
    tables: Sequence[TableFigures], thresholds: Thresholds, *, bce: tuple[float, float] | None = None
) -> list[Gate]:
    """All gates, table by table.

    Args:
        bce: of a validation sample, before and after the clustering; None if there is none.
    """
    gates = [
        _gate(thresholds, threshold, one.table, value) for one in tables for threshold, value in _values(one).items()
    ]
    return [*gates, _gate(thresholds, "max_bce_ratio", None, "no sample" if bce is None else _ratio(bce[1], bce[0]))]


def _values(one: TableFigures) -> dict[str, float | str]:
    """Field of `Thresholds` → figure of the table, or why there is none."""
    first, random = one.generation == 1, one.random_entropies
    return {
        "min_h1": h1_share(one.entropies, num_ids=one.num_ids, num_rows=one.num_rows),
        "min_h2_gain": h2_gain(one.entropies, random, num_ids=one.num_ids),
        "min_learned": learned_share(one.entropies, random, num_ids=one.num_ids, num_rows=one.num_rows),
        "max_error": _ratio(one.error, one.variance),
        "max_objective_ratio": "first clustering"
        if first
        else _ratio(one.error, max(one.parent_error, _ROUNDING * one.variance)),
        "max_churn": "first clustering" if first else one.churn,
        "max_unseen": "not counted" if one.unseen is None else one.unseen,
    }


def _ratio(value: float, to: float) -> float:
    if to == 0:
        return 0.0 if value == 0 else math.inf
    return value / to


def _gate(thresholds: Thresholds, threshold: str, table: str | None, value: float | str) -> Gate:
    bound: float = getattr(thresholds, threshold)
    if isinstance(value, str):
        return Gate(threshold=threshold, table=table, value=None, bound=bound, passed=True, note=value)
    value = float(value)  # numpy's is no JSON
    passed = value >= bound if threshold.startswith("min_") else value <= bound  # NaN does not pass
    return Gate(threshold=threshold, table=table, value=value, bound=bound, passed=passed)
