"""Tasks in processes of this machine."""

import mmap
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

import numpy as np

from torchrec_cce.files.cache import live_folder, path_of, scratch_file
from torchrec_cce.workers.engine import TICK_S, Engine, WorkerDied, next_tasks, result_of_lost

_ALIGNMENT = 64
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_COUNTER = np.dtype(np.int64)

T = TypeVar("T")
Task = TypeVar("Task")
Result = TypeVar("Result")


class LocalEngine(Engine):
    """An engine of `num_workers` processes (None = one a core), each started when it is first needed.

    Shared values are files without a name in the cache folder (`TORCHREC_CCE_CACHE`): their space is free again when
    the last process that uses them has ended, also if all are killed. Workers end with the process that started them.

    Args:
        stopping_s: how many seconds a task that is not wanted any more has to stop after a SIGTERM; 0 kills its worker
            at once.
    """

    def __init__(self, num_workers: int | None = None, *, stopping_s: float = 0.0) -> None:
        self.num_workers = num_workers or os.cpu_count() or 1
        self._stopping_s = stopping_s
        self._started: list[_WorkerProcess] = []
        self._idle: list[_WorkerProcess] = []
        self._resources = ExitStack()

    def __exit__(self, *_error: object) -> None:
        # Whatever still runs is not wanted any more, and may take minutes.
        for worker in self._started:
            worker.stop(gently=self._stopping_s > 0)
        deadline = time.monotonic() + self._stopping_s
        for worker in self._started:
            worker.join(max(0.0, deadline - time.monotonic()))
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
        file = self._resources.enter_context(scratch_file(live_folder(), stop))
        for part, (start, _) in zip(parts, bounds, strict=True):
            file.seek(start)
            file.write(part)
        file.flush()
        return FileShared(path=path_of(file), head=head, bounds=bounds)

    def counters(self, count: int) -> "FileCounters":
        """In a file. Raises OSError if there is no room for it."""
        file = self._resources.enter_context(scratch_file(live_folder(), count * _COUNTER.itemsize))
        return FileCounters(path=path_of(file), count=count)

    def run(
        self,
        function: Callable[[Task], Result],
        tasks: Iterable[Task | None],
        *,
        threads: int = 1,
        tick: Callable[[], object] | None = None,
        lost: Callable[[Task], Result] | None = None,
    ) -> Iterator[tuple[Task, Result]]:
        left = iter(tasks)
        busy: dict[Connection, tuple[_WorkerProcess, Task]] = {}
        try:
            while True:
                for task in next_tasks(left, self.num_workers // threads - len(busy)):
                    worker = self._free_worker()
                    busy[worker.connection] = worker, task
                    worker.begin(function, task)
                if not busy:
                    return
                ready = wait(list(busy), None if tick is None else TICK_S)
                if tick is not None and not ready:
                    tick()
                for connection in ready:
                    assert isinstance(connection, Connection)
                    worker, task = busy[connection]
                    try:
                        result: Result = worker.answer()
                        self._idle.append(worker)
                    except WorkerDied as death:
                        worker.stop(gently=self._stopping_s > 0)
                        result = result_of_lost(task, death, lost)
                    del busy[connection]
                    yield task, result
        finally:
            for worker, _ in busy.values():
                worker.stop(gently=self._stopping_s > 0)

    def _free_worker(self) -> "_WorkerProcess":
        """One that waits for a task and has not died meanwhile, or else a new one."""
        while self._idle:
            worker = self._idle.pop()
            if worker.process.is_alive():
                return worker
        self._started.append(_WorkerProcess())
        return self._started[-1]


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


@dataclass(frozen=True, kw_only=True)
class FileCounters:
    """Numbers in a file that a process of this machine holds open."""

    path: str
    count: int

    def set(self, start: int, *values: int) -> None:
        """In one write, so that nobody reads one number without the others."""
        with open(self.path, "r+b", buffering=0) as file:
            file.seek(start * _COUNTER.itemsize)
            file.write(np.array(values, _COUNTER).tobytes())

    def read(self) -> list[int]:
        numbers: list[int] = np.fromfile(self.path, _COUNTER, self.count).tolist()
        return numbers


class _WorkerProcess:
    """A process, already started, at the other end of a pipe of its own.

    It has one thread for each library's arithmetic, leaves Ctrl-C to the process that started it, and ends with that,
    however that ends. If it dies itself, even in the middle of an answer, the pipe ends and `answer` says so.
    (`ProcessPoolExecutor` keeps both ends of its pipe open, and then waits for the rest of the answer for ever.)
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit locks of OpenMP's and readers' threads
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,))
        # Both are inherited, and must be in force before the worker imports anything.
        with theirs, _environment(_ONE_THREAD), _masked(signal.SIGINT):
            self.process.start()

    def begin(self, function: Callable[[Task], object], task: Task) -> None:
        """Send it a task. If it is dead, `answer` says so."""
        with suppress(OSError):
            self.connection.send((function, task))

    def answer(self) -> Any:
        """Wait for the result of its task, or raise what that raised.

        Raises:
            WorkerDied: it did not come to an answer.
        """
        try:
            error, result = self.connection.recv()
        except (EOFError, OSError) as cause:
            raise WorkerDied("a worker process") from cause
        if error is not None:
            raise error from _InWorker(result)
        return result

    def stop(self, *, gently: bool) -> None:
        """Kill it, or ask its task to stop by a SIGTERM: just one, for a task may take a second one for impatience."""
        if not self.connection.closed:
            self.connection.close()  # nothing that it still has to say is wanted, nor does it get another task
            (self.process.terminate if gently else self.process.kill)()

    def join(self, within_s: float) -> None:
        """Wait until it has ended, and kill it if that takes longer than `within_s`."""
        self.process.join(within_s)
        self.process.kill()
        self.process.join()


class _InWorker(Exception):
    """Where in a worker an error was raised: the traceback as text."""


def _work(connection: Connection) -> None:
    """What the process does, until nobody is at the other end."""
    _end_with_parent()
    with suppress(EOFError, OSError):
        while True:
            function, task = connection.recv()
            answer: tuple[BaseException | None, Any]
            try:
                answer = None, function(task)
            except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  (raised again where the task came from)
                answer = error, traceback.format_exc()
            connection.send(answer)


def _end_with_parent() -> None:
    """End when the parent does, also in the middle of a task, which would not notice."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ[name] for name in variables if name in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _masked(number: signal.Signals) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
