"""How far a remap is: from the files that are finished, and from what workers count of those in work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torchrec_cce.jobs.remap.file import FileResult, FileTask
from torchrec_cce.workers.engine import Counters


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a job is: after each file, and about twice a second meanwhile."""

    done_files: int
    num_files: int
    done_bytes: int
    """Of input, without what an earlier process did."""
    num_bytes: int
    rows: int
    """Done by this process."""


class Watcher:
    """Tells `report` how far a job is.

    Args:
        num_finished: files that an earlier process finished.
        counters: those of `tasks`.
    """

    def __init__(
        self,
        report: Callable[[Progress], object],
        tasks: Sequence[FileTask],
        counters: Counters,
        *,
        num_finished: int,
    ) -> None:
        self._report, self._counters = report, counters
        self._left = {task.number: task.file.num_bytes for task in tasks}
        self._done_files, self._num_files = num_finished, num_finished + len(tasks)
        self._num_bytes = sum(self._left.values())
        self._rows = 0
        self._counted = [0] * 2 * len(tasks)

    def finished(self, task: FileTask, result: FileResult) -> None:
        """A file is."""
        del self._left[task.number]
        self._rows += result.finished.num_rows
        self._done_files += 1
        self._tell()

    def tick(self) -> None:
        """Time has passed."""
        self._counted = self._counters.read()
        self._tell()

    def _tell(self) -> None:
        in_work = [self._counted[2 * number : 2 * number + 2] for number in self._left]
        self._report(
            Progress(
                done_files=self._done_files,
                num_files=self._num_files,
                done_bytes=self._num_bytes - sum(self._left.values()) + sum(num_bytes for _, num_bytes in in_work),
                num_bytes=self._num_bytes,
                rows=self._rows + sum(rows for rows, _ in in_work),
            )
        )
