"""`torchrec-cce bench PLAN.toml` and `torchrec-cce report`: methods compared on one log, and what to configure."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from torchrec_cce.training.command import INTERRUPTED, one_line_errors, print_table, quiet_libraries, say

if TYPE_CHECKING:
    from torchrec_cce.experiments.pareto import Candidate
    from torchrec_cce.experiments.results import TrialResult

_FAILED = 1


def bench(
    plan: Annotated[Path, typer.Argument(help="The plan's TOML file.")],
    out: Annotated[Path, typer.Option(help="Folder for runs and results; what is there already is not run again.")] = (
        Path("runs/bench")
    ),
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes of one thread each; one a core if not given.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress bar.")] = False,
) -> None:
    """Compare methods on one log, at several caps and seeds, each at its best learning rate."""
    quiet_libraries()
    from torchrec_cce.experiments.plan import read_plan
    from torchrec_cce.experiments.results import RESULTS, chosen_results
    from torchrec_cce.experiments.runner import bench as run

    with one_line_errors():
        try:
            results = run(read_plan(plan), out, workers=workers or os.cpu_count() or 1, show_progress=not quiet)
        except KeyboardInterrupt as interrupt:
            say(f"interrupted; the same command goes on, and the results so far are in {out / RESULTS}")
            raise typer.Exit(INTERRUPTED) from interrupt
    trained = chosen_results(results)
    print_comparison(trained)
    for result in results:
        if result.chosen and result.error is not None:
            cap = "" if result.max_parameters is None else f" at {result.max_parameters:,}"
            say(f"failed: {result.name}{cap}, seed {result.seed}: {result.error}")
    typer.echo(f"results: {out / RESULTS}")
    if not trained:
        raise typer.Exit(_FAILED)


def print_comparison(results: "Sequence[TrialResult]") -> None:
    """The table of a comparison."""
    from torchrec_cce.experiments.comparison import COLUMNS, NOTE, cells
    from torchrec_cce.experiments.curve import seed_groups

    headers = [column.replace(" ", "\n") for column in COLUMNS]
    print_table(headers, [cells(group) for group in seed_groups(results)], numbers=True)
    typer.echo(NOTE)


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
    pointers = largest and (
        f"largest table, {largest.name}",
        f"{largest.num_columns} columns of {largest.num_rows:,} rows, {largest.pointer_bits}-bit pointers",
    )
    rows = [
        ("total bytes", f"{advice.total_bytes:,}"),
        ("on the accelerator", f"{advice.accelerator_bytes:,}"),
        ("in host memory", f"{advice.pointer_bytes:,}"),
        *([pointers] if pointers else []),
        ("test AUC", str(advice.auc)),
        ("test BCE", str(advice.bce)),
        ("runs", ", ".join(advice.runs)),
    ]
    print_table((advice.label, ""), rows)
    typer.echo(advice.to_toml())
