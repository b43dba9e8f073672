"""Tasks in processes of this machine."""

import mmap
import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Generic, TypeVar

import numpy as np

from torchrec_cce.files.cache import live_folder, path_of, scratch_file
from torchrec_cce.workers.engine import TICK_S, Engine, WorkerDied, next_tasks, result_of_lost
from torchrec_cce.workers.process import WorkerProcess

_ALIGNMENT = 64
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
        self._started: list[WorkerProcess] = []
        self._idle: list[WorkerProcess] = []
        self._resources = ExitStack()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Whatever still runs is not wanted any more, and may take minutes.
        for worker in self._started:
            self._stop(worker)
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
        busy: dict[Connection, tuple[WorkerProcess, Task]] = {}
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
                        self._stop(worker)
                        result = result_of_lost(task, death, lost)
                    del busy[connection]
                    yield task, result
        finally:
            for worker, _ in busy.values():
                self._stop(worker)

    def _free_worker(self) -> WorkerProcess:
        """One that waits for a task and has not died meanwhile, or else a new one."""
        while self._idle:
            worker = self._idle.pop()
            if worker.process.is_alive():
                return worker
        self._started.append(WorkerProcess())
        return self._started[-1]

    def _stop(self, worker: WorkerProcess) -> None:
        worker.stop(gently=self._stopping_s > 0)


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
