"""`torchrec-cce verify`: what is damaged in a run's newest checkpoint, file by file."""

import json
from pathlib import Path
from typing import Annotated

import typer

from torchrec_cce.training.command import one_line_errors, quiet_libraries

_DAMAGED = 1


def verify(
    run_dir: Annotated[Path, typer.Argument(help="The folder of a run, or of a checkpoint of one.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON value.")] = False,
) -> None:
    """Read every file of a run's newest checkpoint and compare its SHA-256. Exit status 1 if anything is damaged."""
    quiet_libraries()
    from torchrec_cce.training.checkpoint import damage_in

    with one_line_errors():
        damage = damage_in(run_dir)
    typer.echo(json.dumps(damage) if as_json else "\n".join(damage or ["no damage"]))
    if damage:
        raise typer.Exit(_DAMAGED)
