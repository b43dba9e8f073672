"""A process that does tasks, one at a time."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from torchrec_cce.workers.engine import WorkerDied

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

Task = TypeVar("Task")


class WorkerProcess:
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
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _masked(number: signal.Signals) -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
