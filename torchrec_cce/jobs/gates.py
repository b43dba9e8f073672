"""What a clustering must pass before it is published: pure functions on its figures.

docs/operations.md says what each gate means, and what to do when one stays closed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torchrec_cce.clustering.entropy import MAX_JOINT_IDS, random_entropies
from torchrec_cce.jobs.thresholds import Thresholds

_MIN_IDS_PER_ROW = 10
"""With fewer IDs a row, random pointers are spread less evenly than learned ones, and their entropies tell nothing."""
_ROUNDING = 1e-6
"""Distances below this share of the variance are those of embeddings that their words give exactly."""
_MIN_ROOM = 0.05
"""Nats that a second column can add, at least, for that to be judged."""


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
    first = one.generation == 1
    return {
        "min_h1": _h1(one),
        "min_h2_gain": _h2_gain(one),
        "min_learned": _learned(one),
        "max_error": _ratio(one.error, one.variance),
        "max_objective_ratio": "first clustering"
        if first
        else _ratio(one.error, max(one.parent_error, _ROUNDING * one.variance)),
        "max_churn": "first clustering" if first else one.churn,
        "max_unseen": "not counted" if one.unseen is None else one.unseen,
    }


def _h1(one: TableFigures) -> float | str:
    most = math.log(min(one.num_rows, one.num_ids))
    return one.entropies[0] / most if most else "one row or one ID"


def _h2_gain(one: TableFigures) -> float | str:
    if one.num_columns == 1:
        return "one column"
    (h1, h2), random = one.entropies[:2], one.random_entropies
    room = min(random[1] - random[0], math.log(min(one.num_ids, MAX_JOINT_IDS)) - h1)
    return "one column tells the IDs apart" if room < _MIN_ROOM else (h2 - h1) / room


def _learned(one: TableFigures) -> float | str:
    if one.num_ids < _MIN_IDS_PER_ROW * one.num_rows or one.num_rows == 1:
        return "few IDs a row"
    return max(1 - found / random for found, random in zip(one.entropies[:2], one.random_entropies[:2], strict=True))


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
