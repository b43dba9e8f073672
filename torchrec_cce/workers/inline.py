"""Tasks in the calling process, one at a time."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from torchrec_cce.workers.engine import TICK_S, Engine, next_tasks

T = TypeVar("T")
Task = TypeVar("Task")
Result = TypeVar("Result")


class InlineEngine(Engine):
    """For a single task, and for tasks that a person watches: no worker has to start, and nothing is copied.

    Libraries keep the threads that they have in this process, so a task's result must not depend on how many those are.
    `tick` is called in a thread of its own while a task runs.

    Args:
        num_workers: how many threads a task may start; None = one a core.
    """

    def __init__(self, num_workers: int | None = None) -> None:
        self.num_workers = num_workers or os.cpu_count() or 1

    def share(self, value: T) -> "InlineShared[T]":
        return InlineShared(value)

    def counters(self, count: int) -> "InlineCounters":
        return InlineCounters(count)

    def run(
        self,
        function: Callable[[Task], Result],
        tasks: Iterable[Task | None],
        *,
        threads: int = 1,  # noqa: ARG002  as many tasks run at a time whatever it is: one
        tick: Callable[[], object] | None = None,
        lost: Callable[[Task], Result] | None = None,  # noqa: ARG002  with its worker, the caller would be gone too
    ) -> Iterator[tuple[Task, Result]]:
        for task in next_tasks(iter(tasks), None):
            with _ticking(tick):
                result = function(task)
            yield task, result

    def __exit__(self, *_error: object) -> None:
        """Nothing has to end."""


@dataclass(frozen=True)
class InlineShared(Generic[T]):
    """The value itself."""

    value: T

    def get(self) -> T:
        return self.value


class InlineCounters:
    """Numbers in a list."""

    def __init__(self, count: int) -> None:
        self._numbers = [0] * count

    def set(self, start: int, *values: int) -> None:
        self._numbers[start : start + len(values)] = values  # the interpreter does this without switching threads

    def read(self) -> list[int]:
        return self._numbers.copy()


@contextmanager
def _ticking(tick: Callable[[], object] | None) -> Iterator[None]:
    if tick is None:
        yield
        return
    ended = threading.Event()

    def tick_until_the_end() -> None:
        while not ended.wait(TICK_S):
            tick()

    thread = threading.Thread(target=tick_until_the_end, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
