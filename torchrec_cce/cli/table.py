"""Tables on the standard output, for people and pipes."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

_PIPE_WIDTH = 200


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print one row a line."""
    table = Table(*headers, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*row)
    # A pipe has no width, and a table that is cut to 80 columns tells a program nothing.
    Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(table)
