"""A comparison of methods in one table, for a terminal, a document or a page with plots."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torchrec_cce.charts.chart import BarChart, Chart, Picture, Series
from torchrec_cce.experiments.curve import SeedGroup, compressed, curves_of, full_table, seed_groups
from torchrec_cce.experiments.entropies import read_metrics
from torchrec_cce.experiments.quality_charts import Size, quality_chart
from torchrec_cce.experiments.report import Report, Row, Section, Table
from torchrec_cce.experiments.results import TrialResult

_CELLS: dict[str, Callable[[SeedGroup], str]] = {
    "method": lambda group: group.first.name,
    "cap": lambda group: "" if group.first.max_parameters is None else f"{group.first.max_parameters:,}",
    "AUC": lambda group: str(group.test_auc),
    "BCE": lambda group: str(group.test_bce),
    "trained parameters": lambda group: f"{group.sizes.parameters:,}",
    "table bytes": lambda group: f"{group.sizes.table_bytes:,}",
    "pointer bytes": lambda group: f"{group.sizes.pointer_bytes + group.sizes.device_pointer_bytes:,}",
    "training bytes": lambda group: f"{group.sizes.training_bytes:,}" if group.sizes.training_bytes else "–",
    "÷ parameters": lambda group: f"{group.sizes.parameter_factor:.1f}×",
    "÷ largest": lambda group: f"{group.sizes.largest_factor:.1f}×",
    "÷ bytes": lambda group: f"{group.sizes.byte_factor:.1f}×",
}
COLUMNS = tuple(_CELLS)
NOTE = (
    "cap: trained parameters a table. ÷ parameters: Σ n·d of full tables over trained parameters, all tables. "
    "÷ largest: the same for the largest table alone. ÷ bytes: full tables over trained tables plus stored pointers. "
    "training bytes: the most that is held while training: tables, state of their optimizer, rows of residents, "
    "pointers and frequencies; where a table is quantized afterwards, of the run that trained it."
)


def to_markdown(results: Sequence[TrialResult]) -> str:
    """For a document."""
    lines = [COLUMNS, tuple("---" if column == COLUMNS[0] else "---:" for column in COLUMNS)]
    lines += [cells(group) for group in seed_groups(results)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def comparison_report(results: Sequence[TrialResult], *, title: str, about: dict[str, str], runs: Path) -> Report:
    """The report of a comparison.

    Args:
        about: facts that belong beside the numbers, e.g. the data and the versions.
        runs: the folder that holds those of the runs.
    """
    groups = seed_groups(results)
    table = Table(
        title="Quality and size",
        note=NOTE,
        columns=COLUMNS,
        rows=tuple(Row(cells=cells(group), runs=group.runs) for group in groups),
    )
    sizes: list[Size] = ["parameters", "total_bytes"]
    if all(group.sizes.training_bytes for group in groups):
        sizes.append("training_bytes")
    charts: list[Picture] = [
        *(_quality_chart(results, size) for size in sizes),
        _bytes_chart(groups),
        _losses_chart(results, runs),
    ]
    if any(result.largest_entropies.learned for result in results):
        charts.append(_entropies_chart(results))
    return Report(
        title=title,
        about=about,
        sections=(Section(title=table.title, tables=(table,), pictures=tuple(charts)),),
        values={
            "title": title,
            "about": about,
            "outcomes": [result.as_outcome(runs / str(result.run)) for result in results],
        },
    )


def cells(group: SeedGroup) -> tuple[str, ...]:
    """One row of the table, as `COLUMNS` names them."""
    return tuple(cell(group) for cell in _CELLS.values())


def _quality_chart(results: Sequence[TrialResult], size: Size) -> Chart:
    curves = curves_of(result for result in results if result.failure is None)
    full = full_table(curves)
    chart = quality_chart(
        name="quality" if size == "parameters" else f"quality-{size}",
        what="Quality against size",
        metric="AUC",
        curves={curve.name: curve for curve in compressed(curves)},
        full=full,
        size=size,
    )
    # With a single cap, all that there is to see on the x axis is how far away the full tables are.
    sizes = () if full is None else (float(getattr(full.sizes, size)),)
    series = tuple(replace(each, x=sizes) if each.style == "level" else each for each in chart.series)
    return replace(chart, series=series)


def _bytes_chart(groups: Sequence[SeedGroup]) -> BarChart:
    bars = {
        "tables (accelerator)": tuple(float(group.sizes.table_bytes) for group in groups),
        "pointers (host)": tuple(float(group.sizes.pointer_bytes) for group in groups),
        "pointers (accelerator)": tuple(float(group.sizes.device_pointer_bytes) for group in groups),
    }
    if not any(bars["pointers (accelerator)"]):
        del bars["pointers (accelerator)"]
    return BarChart(
        name="bytes",
        caption="Bytes of tables and of index pointers",
        x_label="bytes",
        names=tuple(group.label for group in groups),
        bars=bars,
        stacked=True,
    )


def _losses_chart(results: Sequence[TrialResult], runs: Path) -> Chart:
    first_seed = min(result.seed for result in results)
    series = []
    for group in seed_groups(result for result in results if result.seed == first_seed):
        records = read_metrics(runs / group.runs[0], "validation")
        series.append(
            Series(
                label=group.label,
                x=tuple(float(record["step"]) for record in records),
                y=tuple(record["bce"] for record in records),
            )
        )
    return Chart(
        name="losses",
        caption="Validation BCE while training, first seed; a clustering makes the curve of CCE jump. That of "
        "residents is bad before the first fold: an evaluation leaves the private rows out, as a published version "
        "does, and what these learned is not in the codewords yet",
        x_label="batches",
        y_label="validation BCE",
        series=tuple(series),
    )


def _entropies_chart(results: Sequence[TrialResult]) -> Chart:
    series = []
    for group in seed_groups(result for result in results if result.largest_entropies.learned):
        for trial in group.trials:
            entropies = trial.largest_entropies
            columns = tuple(float(m) for m in range(1, len(entropies.learned) + 1))
            series.append(Series(label=f"{group.label}, seed {trial.seed}", x=columns, y=entropies.learned))
            series.append(Series(label="", x=columns, y=entropies.random, style="bound"))
    return Chart(
        name="entropies",
        caption="Entropy of the pointers of CCE's largest table: as random as a hash (dashed) nothing was learned, "
        "near zero the columns collapsed",
        x_label="columns together",
        y_label="entropy, nats",
        series=tuple(series),
        whole_x=True,
        y_range=(0.0, 1.05 * max(y for each in series for y in each.y)),
    )
