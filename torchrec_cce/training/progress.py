"""A progress line with loss and rows a second."""

from types import TracebackType

from rich.progress import Progress as Bar
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn


class ProgressLine:
    """What a run shows while it trains.

    Args:
        title: of the run.
        visible: false on the ranks that stay silent.
    """

    def __init__(self, title: str, *, visible: bool) -> None:
        self._bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.description}  {task.completed:,.0f} rows  {task.fields[status]}"),
            TimeElapsedColumn(),
            disable=not visible,
        )
        self._task = self._bar.add_task(title, total=None, status="")

    def advance(self, rows: int, *, epoch: int, loss: float, rows_per_second: float) -> None:
        """`rows` more were trained; `loss` is the mean BCE since the last record."""
        self._bar.update(
            self._task, advance=rows, status=f"epoch {epoch + 1}  loss {loss:.4f}  {rows_per_second:,.0f} rows/s"
        )

    def note(self, activity: str) -> None:
        """Say what is being done between two batches."""
        self._bar.update(self._task, status=activity)

    def __enter__(self) -> "ProgressLine":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()
