"""`torchrec-cce bench PLAN.toml`: methods × caps × seeds on one log, and what each came to."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from torchrec_cce.cli.table import print_table
from torchrec_cce.training.command import one_line_errors, quiet_libraries, say

if TYPE_CHECKING:
    from torchrec_cce.experiments.results import TrialResult

_FAILED = 1
_INTERRUPTED = 130
"""What a shell reports for a program that Ctrl-C ended."""


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
    from torchrec_cce.experiments.bench import bench as run
    from torchrec_cce.experiments.plan import read_plan
    from torchrec_cce.experiments.results import RESULTS, chosen_results

    with one_line_errors():
        try:
            results = run(read_plan(plan), out, workers=workers or os.cpu_count() or 1, show_progress=not quiet)
        except KeyboardInterrupt as interrupt:
            say(f"interrupted; the same command goes on, and the results so far are in {out / RESULTS}")
            raise typer.Exit(_INTERRUPTED) from interrupt
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
