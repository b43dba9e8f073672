"""The command line: parse, call, print.

A command imports what it runs when it runs: `--help`, and all of `maps` but `publish`, do not wait for torch.
"""

from pathlib import Path
from typing import Annotated

import typer

from torchrec_cce.cli import maps
from torchrec_cce.cli.experiments import bench, print_comparison, report
from torchrec_cce.cli.plan import plan
from torchrec_cce.cli.recluster import recluster
from torchrec_cce.cli.remap import remap
from torchrec_cce.cli.verify import verify
from torchrec_cce.training.command import evaluate, one_line_errors, quiet_libraries, train

app = typer.Typer(pretty_exceptions_enable=False, no_args_is_help=True, help="Clustered Compositional Embeddings.")
app.command()(train)
app.command()(evaluate)
app.command()(plan)
app.command()(bench)
app.command()(report)
app.command()(recluster)
app.command()(remap)
app.command()(verify)
app.add_typer(maps.app, name="maps")


@app.command()
def demo(
    data: Annotated[
        Path | None, typer.Option(help="A Criteo TSV (plain or .gz) or Parquet; made if not given.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for data, runs and report; an older demo in it goes.")] = Path(
        "runs/demo"
    ),
    label: Annotated[str, typer.Option(help="Parquet: the column of clicks.")] = "label",
    ignore: Annotated[list[str] | None, typer.Option(help="Parquet: a column to leave out; may be repeated.")] = None,
    max_rows: Annotated[int, typer.Option(help="Rows that are used.")] = 300_000,
    max_parameters: Annotated[int | None, typer.Option(help="The cap for each table.")] = None,
    seed: int = 0,
) -> None:
    """Compare full tables, the hashing trick, CE concat and CCE on one click log."""
    quiet_libraries()
    from torchrec_cce.experiments.demo import run_demo

    with one_line_errors():
        results, about = run_demo(
            out,
            data=data,
            label=label,
            ignore=ignore or [],
            max_rows=max_rows,
            max_parameters=max_parameters,
            seed=seed,
        )
    print_comparison(results)
    for name, fact in about.items():
        typer.echo(f"{name}: {fact}")
    typer.echo(f"report: {out / 'report.html'} and {out / 'report.json'}")


def main() -> None:
    """Entry point of `torchrec-cce`."""
    app()
