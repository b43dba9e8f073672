"""One measured number as one JSON line."""

import json
import statistics
import time
from collections.abc import Callable, Mapping


def report(figure: str, value: float, *, target: str | None = None, holds: bool | None = None, against: str) -> None:
    """Print a figure.

    Args:
        figure: what was measured, with its unit.
        target: the value to reach, e.g. `"≥ 3"`; None if there is none.
        holds: whether the target is reached.
        against: what the figure is compared with, and on which data.
    """
    line = {"figure": figure, "value": round(value, 6), "target": target, "holds": holds, "against": against}
    print(json.dumps(line, ensure_ascii=False), flush=True)


def race(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 7,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, float]:
    """Median seconds of each candidate, one after the other in every round, after one round to warm up.

    Args:
        clock: what tells seconds; the default counts those of CPUs.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, candidate in candidates.items():
            started = clock()
            candidate()
            if number > 0:
                seconds[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}
