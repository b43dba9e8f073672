"""Tasks in processes of this machine."""

import mmap
import os
import pickle
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, BinaryIO, Generic, TypeVar

from torchrec_cce.errors import JobError
from torchrec_cce.files.cache import default_cache
from torchrec_cce.files.unnamed import scratch_file
from torchrec_cce.workers.counters import COUNTER, TICK_S, FileCounters
from torchrec_cce.workers.processes import WorkerContext, end_with_parent

_ALIGNMENT = 64

T = TypeVar("T")
Task = TypeVar("Task")
Result = TypeVar("Result")


class LocalEngine:
    """An engine of `num_workers` processes (None = one a core); see `torchrec_cce.workers.engine.Engine`.

    Shared values are files without a name in the cache folder (`TORCHREC_CCE_CACHE`): their space is free again when
    the last process that uses them has ended, also if all are killed. Workers end with the process that started them.
    """

    def __init__(self, num_workers: int | None = None) -> None:
        self.num_workers = num_workers or os.cpu_count() or 1
        self._context = WorkerContext()
        self._idle: list[_Worker] = []
        self._resources = ExitStack()

    def __enter__(self) -> "LocalEngine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Whatever still runs is not wanted any more, and may take minutes.
        started = [process for process in self._context.started if process.pid is not None]
        for process in started:
            process.kill()
        for process in started:
            process.join()
        for worker in self._idle:
            worker.connection.close()
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
        left = iter(tasks)
        busy: dict[Connection, tuple[_Worker, Task]] = {}
        try:
            while True:
                for task in islice(left, self.num_workers // threads - len(busy)):
                    worker = self._idle.pop() if self._idle else self._start()
                    busy[worker.connection] = worker, task
                    with _named(task):
                        worker.connection.send((function, task))
                if not busy:
                    return
                ready = wait(list(busy), None if tick is None else TICK_S)
                if tick is not None and not ready:
                    tick()
                for connection in ready:
                    assert isinstance(connection, Connection)
                    worker, task = busy[connection]
                    with _named(task):
                        error, result = connection.recv()
                    del busy[connection]
                    self._idle.append(worker)
                    if error is not None:
                        raise error from _InWorker(result)
                    yield task, result
        finally:
            for worker, _ in busy.values():
                worker.process.kill()
                worker.connection.close()

    def _start(self) -> "_Worker":
        """A new worker, at the other end of a pipe of its own: whenever it dies, in the middle of an answer too, that
        is seen here. (`ProcessPoolExecutor` has one pipe for all, and then waits for the rest of the answer for ever.)
        """
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs,))
        process.start()
        theirs.close()
        return _Worker(process=process, connection=ours)


@dataclass(frozen=True, kw_only=True)
class _Worker:
    """A process, and our end of the pipe to it."""

    process: SpawnProcess
    connection: Connection


class _InWorker(Exception):
    """Where in a worker an error was raised: the traceback as text."""


@contextmanager
def _named(task: object) -> Iterator[None]:
    """Turn the end of the worker at the other end into an error that names its task."""
    try:
        yield
    except (EOFError, OSError) as error:
        raise JobError(
            f"a worker process vanished (killed, or out of memory) while it worked on: {task}; nothing was changed, "
            "run the job again"
        ) from error


def _work(connection: Connection) -> None:
    """What a worker does: a task at a time, until there are no more."""
    end_with_parent()
    with suppress(EOFError, OSError):
        while True:
            function, task = connection.recv()
            answer: tuple[Exception | None, Any]
            try:
                answer = None, function(task)
            except Exception as error:  # noqa: BLE001  (raised again where the task came from)
                answer = error, traceback.format_exc()
            connection.send(answer)


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
