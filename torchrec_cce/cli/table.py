"""Tables on the standard output, for people and pipes."""

import shutil
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

_LEAST_WIDTH = 200


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False) -> None:
    """Print one row a line.

    Args:
        numbers: align all columns but the first to the right.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, header in enumerate(headers):
        table.add_column(header, justify="right" if numbers and place else "left")
    for row in rows:
        table.add_row(*row)
    # A narrow terminal wraps lines by itself, and a pipe has no width: in both, cells that were cut would tell nothing.
    Console(highlight=False, width=max(shutil.get_terminal_size().columns, _LEAST_WIDTH)).print(table)
