"""Processes that do not outlive the one that started them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def end_with_parent() -> None:
    """Called in a process that `multiprocessing` started: end when its parent does, however that ends.

    Workers of a pool would otherwise wait for ever for the next task of a parent that was killed.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class WorkerContext(SpawnContext):
    """Starts workers, and remembers them. Spawned, not forked: the parent may hold threads of OpenMP and of readers."""

    def __init__(self) -> None:
        self.started: list[SpawnProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:  # type: ignore[override]
        process = _Worker(*args, **kwargs)
        self.started.append(process)
        return process


class _Worker(SpawnProcess):
    """A process that has one thread for each library's arithmetic, and leaves Ctrl-C to the one that started it."""

    def start(self) -> None:
        # Both are inherited, and must be in force before the worker imports anything.
        with _environment(_ONE_THREAD), _masked(signal.SIGINT):
            super().start()


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
