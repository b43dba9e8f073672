"""A comparison of methods as a table, a JSON file and a page with plots."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from torchrec_cce.experiments.outcome import Outcome, Summary, summarise
from torchrec_cce.files.atomic import write_json
from torchrec_cce.files.page import new_plot, to_png, write_page

COLUMNS = (
    "method",
    "cap",
    "AUC",
    "BCE",
    "trained parameters",
    "table bytes",
    "pointer bytes",
    "÷ parameters",
    "÷ largest",
    "÷ bytes",
)
NOTE = (
    "cap: trained parameters a table. ÷ parameters: Σ n·d of full tables over trained parameters, all tables. "
    "÷ largest: the same for the largest table alone. ÷ bytes: full tables over trained tables plus stored pointers."
)


def cells(summary: Summary) -> tuple[str, ...]:
    """One row of the table, as `COLUMNS` names them."""
    sizes = summary.sizes
    return (
        summary.name,
        "" if summary.max_parameters is None else f"{summary.max_parameters:,}",
        str(summary.auc),
        str(summary.bce),
        f"{sizes.parameters:,}",
        f"{sizes.table_bytes:,}",
        f"{sizes.pointer_bytes + sizes.device_pointer_bytes:,}",
        f"{sizes.parameter_factor:.1f}×",
        f"{sizes.largest_factor:.1f}×",
        f"{sizes.byte_factor:.1f}×",
    )


def to_markdown(outcomes: Sequence[Outcome]) -> str:
    """For a document."""
    lines = [COLUMNS, tuple("---" if column == COLUMNS[0] else "---:" for column in COLUMNS)]
    lines += [cells(summary) for summary in summarise(outcomes)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_report(folder: Path, outcomes: Sequence[Outcome], *, title: str, about: dict[str, str]) -> None:
    """Write `report.json` and `report.html`, which needs no other file, to `folder`.

    Args:
        about: facts that belong beside the numbers, e.g. the data and the versions.
    """
    values = {"title": title, "about": about, "outcomes": [asdict(outcome) for outcome in outcomes]}
    write_json(folder / "report.json", values, indent=2, strict=True)
    write_page(
        folder / "report.html",
        Path(__file__).with_name("report.html"),
        _plots(outcomes),
        title=title,
        about=about,
        columns=COLUMNS,
        rows=[cells(summary) for summary in summarise(outcomes)],
        note=NOTE,
    )


def _plots(outcomes: Sequence[Outcome]) -> dict[str, bytes]:
    """Caption → PNG."""
    plots = {
        "Test AUC against trained parameters; bars are one standard deviation over seeds": _quality_plot(outcomes),
        "Bytes of tables and of index pointers": _bytes_plot(outcomes),
        "Validation BCE while training, first seed; a clustering makes the curve of CCE jump": _curves_plot(outcomes),
    }
    if any(outcome.entropies for outcome in outcomes):
        caption = (
            "Entropy of the pointers of CCE's largest table: as random as a hash (dashed) nothing was learned, near "
            "zero the columns collapsed"
        )
        plots[caption] = _entropy_plot(outcomes)
    return plots


def _quality_plot(outcomes: Sequence[Outcome]) -> bytes:
    figure, axes = new_plot()
    by_method: dict[str, list[Summary]] = {}
    for summary in summarise(outcomes):
        by_method.setdefault(summary.name, []).append(summary)
    for method, summaries in by_method.items():
        if summaries[0].max_parameters is None:
            full = summaries[0]
            axes.axhline(full.auc.mean, linestyle="--", color="gray")
            axes.plot(full.sizes.parameters, full.auc.mean, marker="o", linestyle="", color="gray", label=method)
            continue
        axes.errorbar(
            [summary.sizes.parameters for summary in summaries],
            [summary.auc.mean for summary in summaries],
            yerr=[summary.auc.deviation for summary in summaries],
            marker="o",
            capsize=3,
            label=method,
        )
    axes.set(xscale="log", xlabel="trained parameters of all tables", ylabel="test AUC")
    axes.legend()
    return to_png(figure)


def _bytes_plot(outcomes: Sequence[Outcome]) -> bytes:
    figure, axes = new_plot()
    summaries = summarise(outcomes)
    names = [_name(summary) for summary in summaries]
    tables = [summary.sizes.table_bytes for summary in summaries]
    axes.barh(names, tables, label="tables (accelerator)")
    axes.barh(names, [s.sizes.pointer_bytes for s in summaries], left=tables, label="pointers (host)")
    beside = [s.sizes.device_pointer_bytes for s in summaries]
    if any(beside):
        left = [s.sizes.total_bytes - s.sizes.device_pointer_bytes for s in summaries]
        axes.barh(names, beside, left=left, label="pointers (accelerator)")
    axes.set(xlabel="bytes")
    axes.invert_yaxis()
    axes.legend()
    return to_png(figure)


def _curves_plot(outcomes: Sequence[Outcome]) -> bytes:
    figure, axes = new_plot()
    first_seed = min(outcome.seed for outcome in outcomes)
    for outcome in outcomes:
        if outcome.seed != first_seed:
            continue
        records = [json.loads(line) for line in (Path(outcome.run_dir) / "metrics.jsonl").read_text().splitlines()]
        curve = [(record["step"], record["bce"]) for record in records if record["kind"] == "validation"]
        axes.plot([step for step, _ in curve], [bce for _, bce in curve], marker=".", label=_name(outcome))
    axes.set(xlabel="batches", ylabel="validation BCE")
    figure.legend(loc="outside right upper")  # no corner is free of curves
    return to_png(figure)


def _entropy_plot(outcomes: Sequence[Outcome]) -> bytes:
    figure, axes = new_plot()
    for outcome in outcomes:
        entropies = outcome.entropies.get(outcome.sizes.largest_table)
        if entropies is not None:
            columns = range(1, len(entropies.learned) + 1)
            (line,) = axes.plot(columns, entropies.learned, marker="o", label=f"{_name(outcome)}, seed {outcome.seed}")
            axes.plot(columns, entropies.random, linestyle="--", color=line.get_color())
    axes.set(xlabel="columns together", ylabel="entropy, nats", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    return to_png(figure)


def _name(one: Outcome | Summary) -> str:
    return one.name if one.max_parameters is None else f"{one.name} {one.max_parameters:,}"
