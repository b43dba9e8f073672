"""`torchrec-cce report`: what an experiment came to, and what to configure for a budget of bytes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from torchrec_cce.cli.table import print_table
from torchrec_cce.training.command import one_line_errors, quiet_libraries

if TYPE_CHECKING:
    from torchrec_cce.experiments.pareto import Candidate


def report(
    results: Annotated[Path, typer.Argument(help="results.parquet of an experiment.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html, report.json and pictures.")],
    runs: Annotated[
        Path | None, typer.Option(help="Folder of the runs' folders; `runs` beside the results if not given.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Of the page; the results' folder if not given.")] = None,
    max_bytes: Annotated[
        int | None, typer.Option(min=1, help="Say what to configure for so many bytes of tables and pointers.")
    ] = None,
) -> None:
    """Write what an experiment came to as a page with plots and as JSON."""
    quiet_libraries()
    from torchrec_cce.experiments.experiment_report import ExperimentReport, write_experiment_report
    from torchrec_cce.experiments.pareto import advise
    from torchrec_cce.experiments.results import read_results

    with one_line_errors():
        read = read_results(results)
        beside = results.parent / "runs" if runs is None else runs
        found = ExperimentReport.of(read, title=title or results.resolve().parent.name, runs=beside)
        write_experiment_report(out, found)
        typer.echo(f"report: {out / 'report.html'} and {out / 'report.json'}")
        if max_bytes is not None:
            _print_advice(advise(read.trials, max_bytes=max_bytes))


def _print_advice(one: "Candidate") -> None:
    largest = one.largest
    rows = [
        ("total bytes", f"{one.total_bytes:,}"),
        ("on the accelerator", f"{one.accelerator_bytes:,}"),
        ("in host memory", f"{one.pointer_bytes:,}"),
        ("test AUC", str(one.auc)),
        ("test BCE", str(one.bce)),
        ("runs", ", ".join(one.runs)),
    ]
    if largest is not None:
        rows.insert(
            3,
            (
                f"largest table, {largest.name}",
                f"{largest.num_columns} columns of {largest.num_rows:,} rows, {largest.pointer_bits}-bit pointers",
            ),
        )
    print_table((one.label, ""), rows)
    typer.echo(one.to_toml())
