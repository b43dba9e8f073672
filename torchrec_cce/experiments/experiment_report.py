"""The report of an experiment: a page with its pictures, and the numbers that both are made of."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from torchrec_cce.charts.chart import Chart, Picture
from torchrec_cce.experiments.compression import Compression, Range, compression
from torchrec_cce.experiments.curve import Curve, MeanDeviation, SeedGroup, compressed, curves_of, full_table
from torchrec_cce.experiments.entropies import Collapse, LargestTable, collapses, entropy_charts, entropy_histories
from torchrec_cce.experiments.pareto import Candidate, budget_charts, candidates_of, pareto_front
from torchrec_cce.experiments.quality_charts import quality_charts, strategies_of, strategy_charts
from torchrec_cce.experiments.report import Report, Row, Section, Table
from torchrec_cce.experiments.results import Results, TrialResult
from torchrec_cce.experiments.theory import convergence_chart, expectation_chart, factorization_map

T = TypeVar("T", SeedGroup, Candidate)

_SHOWN = 4
"""Of H1 … Hc, which `report.json` has all; H1 and H2 tell nearly all that there is."""


def experiment_report(results: Results, *, title: str, runs: Path | None = None) -> Report:
    """Work out all that is told of an experiment.

    Args:
        runs: the folder that holds those of the runs, for what they measured meanwhile; None if there is none.
    """
    curves = curves_of(results.chosen)
    full = full_table(curves)
    found = [] if full is None else [compression(curve, full) for curve in compressed(curves)]
    candidates = candidates_of(results.trials)
    front = pareto_front(candidates)
    spreads = collapses(curves)
    strategies = strategies_of(curves)
    pictures: dict[str, Sequence[Picture]] = {
        "BCE": quality_charts(curves, "BCE"),
        "AUC": quality_charts(curves, "AUC"),
        "clusterings": [*strategy_charts(strategies, full, "BCE"), *strategy_charts(strategies, full, "AUC")],
        "bytes": budget_charts(candidates),
        "entropies": [] if runs is None else entropy_charts(entropy_histories(curves, runs)),
        "theory": [factorization_map(), convergence_chart(), expectation_chart()],
    }
    sections = [
        Section(
            title="Test BCE against parameters",
            lines=() if curves else ("No trial at a tuned rate has a result.",),
            pictures=tuple(pictures["BCE"]),
        ),
        Section(title="Test AUC against parameters", pictures=tuple(pictures["AUC"])),
        Section(
            title="Compression at the quality of full tables",
            lines=() if full else ("No full tables were run, so that there is nothing to compare with.",),
            tables=(compression_table(found),) if found else (),
        ),
        Section(
            title="What to configure for a budget of bytes",
            tables=(pareto_table(front),) if front else (),
            pictures=tuple(pictures["bytes"]),
        ),
        Section(title="Strategies for CCE", pictures=tuple(pictures["clusterings"])),
        Section(
            title="Entropies of the largest table's pointers",
            tables=(collapse_table(spreads),) if spreads else (),
            pictures=tuple(pictures["entropies"]),
        ),
        Section(title="Everything that was run", tables=(points_table(curves),) if curves else ()),
        Section(
            title="Trials without a result",
            tables=(failures_table(results.failures),) if results.failures else (),
        ),
        Section(title="Theory", pictures=tuple(pictures["theory"])),
    ]
    about = _about(results, full)
    return Report(
        title=title,
        about=about,
        sections=tuple(section for section in sections if section.lines or section.tables or section.pictures),
        values={
            "title": title,
            "about": about,
            "trials": [_trial(trial) for trial in results.trials],
            "failures": [_failure(trial) for trial in results.failures],
            "curves": [_curve(curve) for curve in curves],
            "compression": [asdict(each) for each in found],
            "candidates": [_with_cap(candidate) for candidate in candidates],
            "pareto_front": [candidate.label for candidate in front],
            "entropies": [_with_cap(collapse) for collapse in spreads],
            "tables": [asdict(table) for section in sections for table in section.tables],
            "pictures": [
                {"kind": "chart" if isinstance(picture, Chart) else "heat map", **asdict(picture)}
                for subject in pictures.values()
                for picture in subject
            ],
        },
    )


def _about(results: Results, full: SeedGroup | None) -> dict[str, str]:
    """Facts that belong beside the numbers."""
    versions = sorted({json.dumps(trial.versions, sort_keys=True) for trial in results.trials})
    return {
        "trials": f"{len(results.trials)}, {len(results.chosen)} of them at tuned rates; "
        f"{len(results.failures)} without a result",
        "full tables": "none were run"
        if full is None
        else f"test BCE {full.test_bce}, AUC {full.test_auc}, {full.sizes.full_bytes:,} bytes",
        "versions": "; ".join(", ".join(f"{k} {v}" for k, v in json.loads(each).items()) for each in versions),
    }


def _trial(trial: TrialResult) -> dict[str, Any]:
    row = {column: value for column, value in trial.row().items() if column not in ("error", "config")}
    return {**row, "entropies": row["entropies"] or [], "random_entropies": row["random_entropies"] or []}


def _failure(trial: TrialResult) -> dict[str, Any]:
    row = trial.row()
    names = ("name", "method", "cap", "seed", "learning_rate", "chosen", "run")
    return {**{name: row[name] for name in names}, "error": trial.failure}


def _curve(curve: Curve) -> dict[str, Any]:
    return {
        "name": curve.name,
        "method": curve.method,
        "points": [
            {
                "cap": point.first.max_parameters,
                "parameters": point.sizes.parameters,
                "training_bytes": point.sizes.training_bytes,
                "test_bce": asdict(point.test_bce),
                "test_auc": asdict(point.test_auc),
                "validation_bce": asdict(point.validation_bce),
                "validation_auc": asdict(point.validation_auc),
                "runs": point.runs,
            }
            for point in curve.points
        ],
    }


def _with_cap(told: Candidate | Collapse) -> dict[str, Any]:
    """The fields of what is told of an entry under one cap, which is called `cap` in files."""
    return {"cap" if name == "max_parameters" else name: value for name, value in asdict(told).items()}


def points_table(curves: Sequence[Curve]) -> Table:
    """Everything at its tuned rate."""
    cells: dict[str, Callable[[SeedGroup], str]] = {
        "entry": lambda point: point.first.name,
        "cap": lambda point: _number(point.first.max_parameters),
        "seeds": lambda point: str(len(point.trials)),
        "rate": lambda point: f"{point.first.learning_rate:g}{'*' * any(trial.rate_at_end for trial in point.trials)}",
        "test AUC": lambda point: _five_digits(point.test_auc),
        "test BCE": lambda point: _five_digits(point.test_bce),
        "trained parameters": lambda point: _number(point.sizes.parameters),
        "÷ all tables": lambda point: _factor(point.sizes.parameter_factor),
        "÷ largest": lambda point: _factor(point.sizes.largest_factor),
        "÷ bytes": lambda point: _factor(point.sizes.byte_factor),
        "host bytes": lambda point: _number(point.sizes.pointer_bytes),
        "accelerator bytes": lambda point: _number(point.sizes.table_bytes + point.sizes.device_pointer_bytes),
        "training bytes": lambda point: _number(point.sizes.training_bytes or None),
    }
    return Table(
        title="Everything that was run",
        note="Mean ± standard deviation over seeds, each entry and cap at the learning rate with the lowest validation "
        "BCE; * marks a rate at the end of those that were tried, where a better one may lie beyond. Host: pointers of "
        "maps. Accelerator: tables, and pointers that live beside them. Training: the most that is held while "
        "training, the state of the optimizer and rows of residents included.",
        columns=tuple(cells),
        rows=_rows(cells, [point for curve in curves for point in curve.points]),
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
        rows=tuple(_compression_row(each) for each in found),
    )


def pareto_table(front: Sequence[Candidate]) -> Table:
    """What to configure for a budget."""
    cells: dict[str, Callable[[Candidate], str]] = {
        "entry": lambda candidate: candidate.name,
        "cap": lambda candidate: _number(candidate.max_parameters),
        "columns × rows": lambda candidate: _columns_by_rows(candidate.largest),
        "pointer bits": lambda candidate: "" if candidate.largest is None else str(candidate.largest.pointer_bits),
        "total bytes": lambda candidate: _number(candidate.total_bytes),
        "accelerator bytes": lambda candidate: _number(candidate.accelerator_bytes),
        "host bytes": lambda candidate: _number(candidate.pointer_bytes),
        "training bytes": lambda candidate: _number(candidate.training_bytes or None),
        "validation AUC": lambda candidate: f"{candidate.validation_auc:.5f}",
        "test AUC": lambda candidate: _five_digits(candidate.auc),
        "test BCE": lambda candidate: _five_digits(candidate.bce),
    }
    return Table(
        title="What to configure for a budget of bytes",
        note="No other entry has as high a validation AUC in as few bytes. Columns × rows and pointer width are those "
        "of the largest table, where pointers are learned.",
        columns=tuple(cells),
        rows=_rows(cells, front),
    )


def collapse_table(found: Sequence[Collapse]) -> Table:
    """What was learned, by the entropies of pointers."""
    most = min(_SHOWN, max((len(collapse.entropies) for collapse in found), default=0))
    return Table(
        title="Entropies of the largest table's pointers",
        note="In nats, mean over seeds: found / of random pointers / of product quantization of the trained full table "
        "with as many columns and rows, where it was run. The verdict is that of the gates before publishing, at their "
        "defaults; “like PQ” is H1 and H2 within a tenth of product quantization's. More columns: in report.json.",
        columns=("entry", "cap", "columns × rows", *(f"H{m}" for m in range(1, most + 1)), "verdict"),
        rows=tuple(_collapse_row(collapse, most) for collapse in found),
    )


def failures_table(failures: Sequence[TrialResult]) -> Table:
    """What came to nothing; one row for trials that differ in seed and rate only."""
    groups: dict[tuple[str, int | None, str], list[TrialResult]] = {}
    for failure in failures:
        groups.setdefault((failure.name, failure.max_parameters, str(failure.failure)), []).append(failure)
    return Table(
        title="Trials without a result",
        note="They are in no figure above.",
        columns=("entry", "cap", "seeds", "rates", "why"),
        rows=tuple(
            Row(
                cells=(
                    name,
                    _number(max_parameters),
                    ", ".join(str(seed) for seed in sorted({failure.seed for failure in group})),
                    ", ".join(f"{rate:g}" for rate in sorted({failure.learning_rate for failure in group})),
                    error,
                ),
                runs=tuple(failure.run for failure in group if failure.run is not None),
            )
            for (name, max_parameters, error), group in groups.items()
        ),
    )


def _rows(cells: Mapping[str, Callable[[T], str]], entries: Sequence[T]) -> tuple[Row, ...]:
    """A row for each entry, of the cell that it has in each column."""
    return tuple(Row(cells=tuple(cell(entry) for cell in cells.values()), runs=entry.runs) for entry in entries)


def _compression_row(entry: Compression) -> Row:
    at = entry.found
    least = "≥ " if entry.state == "smallest cap" else ""
    cells: tuple[str, ...] = ("–",) * 5
    if at is not None:
        factors = (at.parameter_factor, at.largest_factor, at.byte_factor)
        sizes = (at.accelerator_bytes, at.host_bytes)
        cells = (*(least + _factors(factor) for factor in factors), *(_sizes(size) for size in sizes))
    return Row(cells=(entry.name, entry.state, *cells), runs=(*entry.runs, *entry.full_runs))


def _collapse_row(collapse: Collapse, most: int) -> Row:
    def beside(m: int) -> str:
        return " / ".join(_nats(values, m) for values in (collapse.entropies, collapse.random, collapse.pq))

    entropies = [beside(m) if m < len(collapse.entropies) else "" for m in range(most)]
    return Row(
        cells=(
            collapse.name,
            _number(collapse.max_parameters),
            _columns_by_rows(collapse.table),
            *entropies,
            collapse.verdict or "unknown",
        ),
        runs=(*collapse.runs, *collapse.pq_runs),
    )


def _columns_by_rows(table: LargestTable | None) -> str:
    return "" if table is None else f"{table.num_columns} × {table.num_rows:,}"


def _nats(values: tuple[float, ...] | None, m: int) -> str:
    return "–" if values is None or m >= len(values) else f"{values[m]:.2f}"


def _five_digits(spread: MeanDeviation) -> str:
    """Losses of methods differ in the fourth digit, and over seeds in the fifth."""
    return f"{spread.mean:.5f} ± {spread.deviation:.5f}" if spread.deviation else f"{spread.mean:.5f}"


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _factor(value: float) -> str:
    if value == 0:
        return "never"
    if value < 1:
        return "below 1"
    return f"{value:,.0f}×" if value >= 100 else f"{value:.1f}×"


def _factors(found: Range) -> str:
    text = _from_to(_factor(found.pessimistic), _factor(found.optimistic))
    if found.worst is None or found.best is None:
        return text
    return f"{text} [{_factor(found.worst)} – {_factor(found.best)}]"


def _sizes(found: Range) -> str:
    return _from_to(
        *("∞" if size == float("inf") else f"{size:,.0f}" for size in (found.optimistic, found.pessimistic))
    )


def _from_to(first: str, last: str) -> str:
    return first if first == last else f"{first} – {last}"
