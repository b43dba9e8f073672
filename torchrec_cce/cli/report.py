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
    from torchrec_cce.experiments.experiment_report import experiment_report
    from torchrec_cce.experiments.pareto import advise
    from torchrec_cce.experiments.report import write_report
    from torchrec_cce.experiments.results import RUNS, read_results

    with one_line_errors():
        read = read_results(results)
        beside = results.parent / RUNS if runs is None else runs
        write_report(out, experiment_report(read, title=title or results.resolve().parent.name, runs=beside))
        typer.echo(f"report: {out / 'report.html'} and {out / 'report.json'}")
        if max_bytes is not None:
            _print_advice(advise(read.trials, max_bytes=max_bytes))


def _print_advice(advice: "Candidate") -> None:
    largest = advice.largest
    rows = [
        ("total bytes", f"{advice.total_bytes:,}"),
        ("on the accelerator", f"{advice.accelerator_bytes:,}"),
        ("in host memory", f"{advice.pointer_bytes:,}"),
        ("test AUC", str(advice.auc)),
        ("test BCE", str(advice.bce)),
        ("runs", ", ".join(advice.runs)),
    ]
    if largest is not None:
        rows.insert(
            3,
            (
                f"largest table, {largest.name}",
                f"{largest.num_columns} columns of {largest.num_rows:,} rows, {largest.pointer_bits}-bit pointers",
            ),
        )
    print_table((advice.label, ""), rows)
    typer.echo(advice.to_toml())
