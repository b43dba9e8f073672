"""The gates that a clustering must pass before it is published: pure functions of its figures.

docs/operations.md says what each gate means, and what to do when one stays closed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torchrec_cce.clustering.entropy import h1_share, h2_gain, learned_share, random_entropies
from torchrec_cce.jobs.recluster.thresholds import Thresholds

_ROUNDING = 1e-6
"""Below this share of the variance, a squared distance is rounding: the codewords give the embeddings exactly."""


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
    """`H1 … Hc` of the new pointers, nats."""
    error: float
    """Mean squared distance from an embedding to its new codewords, over the IDs that k-means trained on."""
    parent_error: float
    """The same to the means of the old map's clusters: the best that the old map can do on today's embeddings."""
    variance: float
    """The same to the mean of all embeddings."""
    churn: float
    """Share of the pointers that differ from the old map's; clusters keep their old numbers where they can."""
    unseen: float | None
    """Share of the IDs that were never seen; None if they were not counted."""

    @property
    def random_entropies(self) -> tuple[float, ...]:
        """`H1 … Hc` of pointers made by hashes, nats."""
        return random_entropies(self.num_ids, self.num_rows, self.num_columns)


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A figure and the bound that it must keep to."""

    threshold: str
    """The field of `Thresholds`, whose name begins with `min_` or `max_`."""
    table: str | None
    """None for a figure of the whole model."""
    value: float | None
    """None where there is no figure; the gate is then open."""
    bound: float
    passed: bool
    note: str = ""
    """Why there is no value."""


def judge(
    tables: Sequence[TableFigures], thresholds: Thresholds, *, bce: tuple[float, float] | None = None
) -> list[Gate]:
    """All gates, table by table.

    Args:
        bce: the BCE of a validation sample before and after the clustering; None without a sample.
    """
    gates = [
        _gate(thresholds, threshold, figures.table, value)
        for figures in tables
        for threshold, value in _values(figures).items()
    ]
    return [*gates, _gate(thresholds, "max_bce_ratio", None, "no sample" if bce is None else _ratio(bce[1], bce[0]))]


def _values(table: TableFigures) -> dict[str, float | str]:
    """Field of `Thresholds` → the table's figure, or why there is none."""
    first, random = table.generation == 1, table.random_entropies
    return {
        "min_h1": h1_share(table.entropies, num_ids=table.num_ids, num_rows=table.num_rows),
        "min_h2_gain": h2_gain(table.entropies, random, num_ids=table.num_ids),
        "min_learned": learned_share(table.entropies, random, num_ids=table.num_ids, num_rows=table.num_rows),
        "max_error": _ratio(table.error, table.variance),
        "max_objective_ratio": "first clustering"
        if first
        else _ratio(table.error, max(table.parent_error, _ROUNDING * table.variance)),
        "max_churn": "first clustering" if first else table.churn,
        "max_unseen": "not counted" if table.unseen is None else table.unseen,
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
