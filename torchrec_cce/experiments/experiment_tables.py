"""The tables of an experiment's report: cells as text, and the runs that each row is made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torchrec_cce.experiments.collapse import Collapse, Entropies
from torchrec_cce.experiments.curve import Curve, Point
from torchrec_cce.experiments.factor import Compression, Range
from torchrec_cce.experiments.outcome import Spread
from torchrec_cce.experiments.pareto import Candidate
from torchrec_cce.experiments.results import Failure

_SHOWN = 4
"""Of H1 … Hc, which `report.json` has all; H1 and H2 tell nearly all that there is."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row."""

    cells: tuple[str, ...]
    runs: tuple[str, ...]
    """The folders of the runs that its numbers are made of."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def points_table(curves: Sequence[Curve]) -> Table:
    """Everything at its tuned rate."""
    return Table(
        title="Everything that was run",
        note="Mean ± standard deviation over seeds, each entry and cap at the learning rate with the lowest validation "
        "BCE; * marks a rate at the end of those that were tried, where a better one may lie beyond. Host: pointers of "
        "maps. Accelerator: tables, and pointers that live beside them.",
        columns=(
            "entry",
            "cap",
            "seeds",
            "rate",
            "test AUC",
            "test BCE",
            "trained parameters",
            "÷ all tables",
            "÷ largest",
            "÷ bytes",
            "host bytes",
            "accelerator bytes",
        ),
        rows=tuple(_point_row(point) for curve in curves for point in curve.points),
    )


def compression_table(found: Sequence[Compression]) -> Table:
    """How much smaller each entry is at the quality of full tables."""
    return Table(
        title="Compression at the quality of full tables",
        note="Where the curve of test BCE over trained parameters meets full tables. Between two caps: measured. "
        "Beyond the largest: from the parabola through the last three caps (pessimistic) to the line through the last "
        "two (optimistic), as in the paper. “≥”: the smallest cap does already. “below 1”: only with more than full "
        "tables take. In brackets 95 % of resampled seeds. All tables: Σ n·d over trained parameters. Bytes: with "
        "pointers.",
        columns=("entry", "found", "÷ all tables", "÷ largest", "÷ bytes", "accelerator bytes", "host bytes"),
        rows=tuple(_compression_row(one) for one in found),
    )


def pareto_table(front: Sequence[Candidate]) -> Table:
    """What to configure for a budget."""
    return Table(
        title="What to configure for a budget of bytes",
        note="No other entry has as high a validation AUC in as few bytes. Columns × rows and pointer width are those "
        "of the largest table, where pointers are learned.",
        columns=(
            "entry",
            "cap",
            "columns × rows",
            "pointer bits",
            "total bytes",
            "accelerator bytes",
            "host bytes",
            "validation AUC",
            "test AUC",
            "test BCE",
        ),
        rows=tuple(_candidate_row(one) for one in front),
    )


def collapse_table(found: Sequence[Collapse]) -> Table:
    """What was learned, by the entropies of pointers."""
    most = min(_SHOWN, max((len(one.entropies) for one in found), default=0))
    return Table(
        title="Entropies of the largest table's pointers",
        note="In nats, mean over seeds: found / of random pointers / of product quantization of the trained full table "
        "with as many columns and rows, where it was run. The verdict is that of the gates before publishing, at their "
        "defaults; “like PQ” is H1 and H2 within a tenth of product quantization's. More columns: in report.json.",
        columns=("entry", "cap", "columns × rows", *(f"H{m}" for m in range(1, most + 1)), "verdict"),
        rows=tuple(_collapse_row(one, most) for one in found),
    )


def failures_table(failures: Sequence[Failure]) -> Table:
    """What came to nothing; one row for trials that differ in seed and rate only."""
    groups: dict[tuple[str, int | None, str], list[Failure]] = {}
    for failure in failures:
        groups.setdefault((failure.name, failure.cap, failure.error), []).append(failure)
    return Table(
        title="Trials without a result",
        note="They are in no figure above.",
        columns=("entry", "cap", "seeds", "rates", "why"),
        rows=tuple(
            Row(
                cells=(
                    name,
                    _number(cap),
                    ", ".join(str(seed) for seed in sorted({one.seed for one in group})),
                    ", ".join(f"{rate:g}" for rate in sorted({one.learning_rate for one in group})),
                    error,
                ),
                runs=tuple(one.run for one in group if one.run is not None),
            )
            for (name, cap, error), group in groups.items()
        ),
    )


def _point_row(point: Point) -> Row:
    first = point.first
    at_end = "*" if any(trial.rate_at_end for trial in point.trials) else ""
    return Row(
        cells=(
            first.name,
            _number(first.cap),
            str(len(point.trials)),
            f"{first.learning_rate:g}{at_end}",
            _spread(point.test_auc),
            _spread(point.test_bce),
            _number(first.parameters),
            _factor(first.full_parameters / first.parameters),
            _factor(first.largest_factor),
            _factor(first.full_bytes / first.total_bytes),
            _number(first.pointer_bytes),
            _number(first.table_bytes + first.device_pointer_bytes),
        ),
        runs=point.runs,
    )


def _compression_row(one: Compression) -> Row:
    at = one.found
    least = "≥ " if one.state == "smallest cap" else ""
    cells: tuple[str, ...] = ("–",) * 5
    if at is not None:
        factors = (at.parameter_factor, at.largest_factor, at.byte_factor)
        sizes = (at.accelerator_bytes, at.host_bytes)
        cells = (*(least + _factors(factor) for factor in factors), *(_sizes(size) for size in sizes))
    return Row(cells=(one.name, one.state, *cells), runs=(*one.runs, *one.full_runs))


def _candidate_row(one: Candidate) -> Row:
    return Row(
        cells=(
            one.name,
            _number(one.cap),
            "" if one.largest is None else f"{one.largest.num_columns} × {one.largest.num_rows:,}",
            "" if one.largest is None else str(one.largest.pointer_bits),
            _number(one.total_bytes),
            _number(one.accelerator_bytes),
            _number(one.pointer_bytes),
            f"{one.validation_auc:.5f}",
            _spread(one.auc),
            _spread(one.bce),
        ),
        runs=one.runs,
    )


def _collapse_row(one: Collapse, most: int) -> Row:
    def beside(m: int) -> str:
        return " / ".join(_nats(values, m) for values in (one.entropies, one.random, one.pq))

    entropies = [beside(m) if m < len(one.entropies) else "" for m in range(most)]
    table = "" if one.table is None else f"{one.table.num_columns} × {one.table.num_rows:,}"
    return Row(
        cells=(one.name, _number(one.cap), table, *entropies, one.verdict or "unknown"), runs=(*one.runs, *one.pq_runs)
    )


def _nats(values: Entropies | None, m: int) -> str:
    return "–" if values is None or m >= len(values) else f"{values[m]:.2f}"


def _spread(one: Spread) -> str:
    """Losses of methods differ in the fourth digit, and over seeds in the fifth."""
    return f"{one.mean:.5f} ± {one.deviation:.5f}" if one.deviation else f"{one.mean:.5f}"


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _factor(value: float) -> str:
    if value == 0:
        return "never"
    if value < 1:
        return "below 1"
    return f"{value:,.0f}×" if value >= 100 else f"{value:.1f}×"


def _factors(one: Range) -> str:
    return _from_to(_factor(one.pessimistic), _factor(one.optimistic), one, _factor)


def _sizes(one: Range) -> str:
    def size(value: float) -> str:
        return "∞" if value == float("inf") else f"{value:,.0f}"

    return _from_to(size(one.optimistic), size(one.pessimistic), None, size)


def _from_to(first: str, last: str, spread: Range | None, show: Callable[[float], str]) -> str:
    text = first if first == last else f"{first} – {last}"
    if spread is None or spread.worst is None or spread.best is None:
        return text
    return f"{text} [{show(spread.worst)} – {show(spread.best)}]"
