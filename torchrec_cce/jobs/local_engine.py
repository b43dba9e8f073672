"""Tasks in processes of this machine."""

import mmap
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import BinaryIO, Generic, TypeVar

from torchrec_cce.children import WorkerContext, end_with_parent
from torchrec_cce.errors import JobError
from torchrec_cce.jobs.counters import COUNTER, TICK_S, FileCounters
from torchrec_cce.jobs.scratch import scratch_file
from torchrec_cce.maps.local_copy import default_cache

_ALIGNMENT = 64

T = TypeVar("T")
Task = TypeVar("Task")
Result = TypeVar("Result")


class LocalEngine:
    """An engine of `num_workers` processes (None = one a core); see `torchrec_cce.jobs.engine.Engine`.

    Shared values are files without a name in the cache folder (`TORCHREC_CCE_CACHE`): their space is free again when
    the last process that uses them has ended, also if all are killed. Workers end with the process that started them.
    """

    def __init__(self, num_workers: int | None = None) -> None:
        self.num_workers = num_workers or os.cpu_count() or 1
        self._context = WorkerContext()
        self._resources = ExitStack()

    def __enter__(self) -> "LocalEngine":
        self._pool = ProcessPoolExecutor(self.num_workers, self._context, end_with_parent)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Whatever still runs is not wanted any more, and may take minutes.
        started = [process for process in self._context.started if process.pid is not None]
        for process in started:
            process.kill()
        # After a Ctrl-C in the middle of a start, to wait for the pool would be to wait for a thread that never began.
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in started:
            process.join()
        self._resources.close()

    def share(self, value: T) -> "FileShared[T]":
        """Write `value` to a file, its arrays as they lie in memory. Raises OSError if there is no room for them."""
        buffers: list[pickle.PickleBuffer] = []
        head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        parts = [buffer.raw() for buffer in buffers]
        bounds, stop = [], 0
        for part in parts:
            start = -(-stop // _ALIGNMENT) * _ALIGNMENT
            stop = start + len(part)
            bounds.append((start, stop))
        file = self._resources.enter_context(scratch_file(default_cache() / "live", stop))
        for part, (start, _) in zip(parts, bounds, strict=True):
            file.seek(start)
            file.write(part)
        file.flush()
        return FileShared(path=_path_of(file), head=head, bounds=bounds)

    def counters(self, count: int) -> FileCounters:
        """In a file. Raises OSError if there is no room for it."""
        file = self._resources.enter_context(scratch_file(default_cache() / "live", count * COUNTER.itemsize))
        return FileCounters(path=_path_of(file), count=count)

    def run(
        self,
        function: Callable[[Task], Result],
        tasks: Iterable[Task],
        *,
        threads: int = 1,
        tick: Callable[[], object] | None = None,
    ) -> Iterator[tuple[Task, Result]]:
        # With one thread each, a second task waits for every worker; with more, it would run beside the first.
        most = 2 * self.num_workers if threads == 1 else self.num_workers // threads
        left = iter(tasks)
        pending: dict[Future[Result], Task] = {}
        try:
            while True:
                for task in islice(left, most - len(pending)):
                    pending[self._pool.submit(function, task)] = task
                if not pending:
                    return
                done, _ = wait(pending, None if tick is None else TICK_S, return_when=FIRST_COMPLETED)
                if tick is not None and not done:
                    tick()
                for future in done:
                    result = future.result()
                    yield pending.pop(future), result
        except BrokenProcessPool as error:
            begun = "; ".join(str(task) for task in pending.values())
            raise JobError(
                f"a worker process vanished (killed, or out of memory) while these were in work: {begun}; nothing was "
                "changed, run the job again"
            ) from error
        finally:
            for future in pending:
                future.cancel()


@dataclass(frozen=True, kw_only=True)
class FileShared(Generic[T]):
    """A value of which all arrays are in a file that a process of this machine holds open."""

    path: str
    head: bytes
    """The pickled value without its arrays."""
    bounds: list[tuple[int, int]]
    """Where the file has the bytes of each array."""

    def get(self) -> T:
        """The value, its arrays memory-mapped and read-only."""
        with open(self.path, "rb") as file:
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        value: T = pickle.loads(self.head, buffers=[view[start:stop] for start, stop in self.bounds])
        return value


def _path_of(file: BinaryIO) -> str:
    """Under which other processes open an open file that may have no name."""
    return f"/proc/{os.getpid()}/fd/{file.fileno()}"
