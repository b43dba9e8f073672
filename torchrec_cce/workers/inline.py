"""The only task of a job, in the process that has the job: no worker has to start for it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torchrec_cce.workers.counters import TICK_S

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_alone(function: Callable[[Task], Result], task: Task, *, tick: Callable[[], object]) -> Result:
    """The result of the task.

    For tasks of which the result does not depend on how many threads the libraries of this process have.

    Args:
        tick: called every `TICK_S` meanwhile, in a thread of its own.
    """
    with _ticking(tick):
        return function(task)


@contextmanager
def _ticking(tick: Callable[[], object]) -> Iterator[None]:
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
