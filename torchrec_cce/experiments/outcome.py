"""What methods came to on one log, and the mean over seeds."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from torchrec_cce.training.sizes import Sizes


@dataclass(frozen=True, kw_only=True)
class Entropies:
    """Of the pointers of one table (Appendix G), in nats."""

    learned: tuple[float, ...]
    """`H1 … Hc`: the smallest entropy of any 1, 2, … c columns together. Near 0: collapsed."""
    random: tuple[float, ...]
    """The same for pointers by hashes. As large as this: nothing was learned."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One method, at one cap, from one seed."""

    method: str
    name: str = ""
    """What it is called in a comparison, which may have a method several times; its method if not given."""
    max_parameters: int | None
    """The cap for each table; None for full tables."""
    seed: int
    learning_rate: float
    """Of the embedding tables."""
    validation_bce: float
    """The lowest of the run."""
    validation_auc: float = math.nan
    """Where it is the lowest."""
    bce: float
    """On the test split, at the lowest validation BCE."""
    auc: float
    sizes: Sizes
    entropies: dict[str, Entropies]
    """CCE table → how its pointers are spread after the last clustering."""
    steps: int
    rows_per_second: float
    seconds: float
    """Of the whole run: start, reading, evaluations and clusterings counted."""
    run_dir: str

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.method)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean and sample standard deviation over seeds."""

    mean: float
    deviation: float
    """0 for a single seed."""

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.deviation:.4f}" if self.deviation else f"{self.mean:.4f}"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One method at one cap, over seeds."""

    method: str
    name: str
    max_parameters: int | None
    learning_rate: float
    seeds: int
    bce: Spread
    auc: Spread
    sizes: Sizes


def summarise(outcomes: Sequence[Outcome]) -> list[Summary]:
    """One summary for each name and cap, in the order of their first outcome."""
    groups: dict[tuple[str, int | None], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.name, outcome.max_parameters), []).append(outcome)
    return [
        Summary(
            method=group[0].method,
            name=name,
            max_parameters=cap,
            learning_rate=group[0].learning_rate,
            seeds=len(group),
            bce=_spread([outcome.bce for outcome in group]),
            auc=_spread([outcome.auc for outcome in group]),
            sizes=group[0].sizes,
        )
        for (name, cap), group in groups.items()
    ]


def _spread(values: list[float]) -> Spread:
    finite = [value for value in values if not math.isnan(value)]
    if not finite:
        return Spread(mean=math.nan, deviation=0.0)
    return Spread(mean=statistics.fmean(finite), deviation=statistics.stdev(finite) if len(finite) > 1 else 0.0)
