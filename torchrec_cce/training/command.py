"""The commands `train` and `evaluate`, and what all commands share.

`train` lies here and not in `torchrec_cce.cli`, because `torchrun -m torchrec_cce.training` runs it too. A command
imports what it runs when it runs, so that its help is there at once.
"""

import logging
import os
import re
import shutil
import sys
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from torchrec_cce.errors import CCEError, ConfigError
from torchrec_cce.files.atomic import json_text

_MISUSED = 2
INTERRUPTED = 130
"""What a shell reports for a program that Ctrl-C ended."""
_LEAST_WIDTH = 200
_STEERING = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Categories of Unicode: control and format characters, halves of pairs, and ends of lines."""
_LIBRARIES = r"(torch|torchrec|fbgemm_gpu|tensordict|torchmetrics)\b"


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an error that a user can mend into one line on stderr and exit status 2."""
    try:
        yield
    except (CCEError, OSError) as error:
        say(f"error: {' '.join(str(error).split())}")
        raise typer.Exit(_MISUSED) from error


@contextmanager
def naming_flags(**flags: str) -> Iterator[None]:
    """Put flags into the messages of the errors that pass.

    The library knows no command line. Where an error says which argument to change, it names the parameter or the field
    in backticks: "choose another `output`". A command says which flag sets that field, and its user reads of the flag.

    Args:
        flags: name of a field → what to say in its place: `output="--output-checkpoint"`. Other names stay as they are.
    """
    try:
        yield
    except CCEError as error:
        before = str(error)
        after = re.sub(r"`(\w+)`", lambda name: flags.get(name[1], name[0]), before)
        if after != before:
            error.args = (after,)
        raise


def say(line: str) -> None:
    """Print to stderr, as `plain` text; of several ranks, only the first one prints."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(plain(line), err=True)


def plain(text: str) -> str:
    """`text` on one line, with what steers a terminal or hides other text written out: names come from strangers."""
    return "".join(
        letter.encode("unicode_escape").decode() if unicodedata.category(letter) in _STEERING else letter
        for letter in text
    )


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False) -> None:
    """Print a table to the standard output, one row a line.

    Args:
        numbers: align all columns but the first to the right.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, header in enumerate(headers):
        table.add_column(header, justify="right" if numbers and place else "left")
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    # A narrow terminal wraps lines by itself, and a pipe has no width: in both, cells that were cut would tell nothing.
    Console(highlight=False, width=max(shutil.get_terminal_size().columns, _LEAST_WIDTH)).print(table)


def quiet_libraries() -> None:
    """Silence deprecations in libraries below us that no user can act on.

    Whoever asks for them by `python -W …` or PYTHONWARNINGS still sees them.
    """
    if sys.warnoptions:
        return
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category, module=_LIBRARIES)
    for name in ("torch.fx._symbolic_trace", "torchrec.distributed.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)


def train(
    config: Annotated[Path, typer.Argument(help="The run's TOML file.")],
    run_dir: Annotated[Path, typer.Option(help="Folder for checkpoint, maps, metrics and result.")] = Path(
        "runs/train"
    ),
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint in the folder.")
    ] = False,
    restartable: Annotated[
        bool,
        typer.Option("--restartable", help="Resume if the folder holds this run, else start: for torchrun's restarts."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress line.")] = False,
) -> None:
    """Train a model with compressed embedding tables."""
    quiet_libraries()
    from torchrec_cce.training import loop
    from torchrec_cce.training.config_file import read_config
    from torchrec_cce.training.run import Start

    with one_line_errors():
        start: Start = "either" if restartable else "resume" if resume else "new"
        result = loop.train(read_config(config), run_dir, start=start, show_progress=not quiet)
    state = "interrupted" if result.interrupted else "finished"
    figures = "".join(f", {name} {value:.5g}" for name, value in (result.best or {}).items())
    say(f"{state} after {result.steps:,} batches{figures}; checkpoint {result.checkpoint}")
    if result.interrupted:
        say(f"continue with --resume --run-dir {run_dir}")
        raise typer.Exit(INTERRUPTED)


def evaluate(
    run_dir: Annotated[Path, typer.Argument(help="The folder of a run.")],
    data: Annotated[
        Path | None, typer.Option(help="A log of the same layout; the run's test split if not given.")
    ] = None,
) -> None:
    """Print BCE and AUC of a run's newest checkpoint as one line of JSON."""
    quiet_libraries()
    from torchrec_cce.training import loop
    from torchrec_cce.training.config_file import read_run_config
    from torchrec_cce.training.data_config import SplitConfig

    with one_line_errors():
        config = read_run_config(run_dir)
        split = config.data.test if data is None else SplitConfig(path=str(data))
        if split is None:
            raise ConfigError(f"{run_dir} has no test split; name a log with --data")
        quality = loop.evaluate(config, run_dir, split)
    typer.echo(json_text(quality, strict=True))
