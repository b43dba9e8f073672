"""Tasks on the threads of this process: compiled loops that hold no lock."""

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

Task = Callable[[], object]

# Number of threads → those. A process that is forked off has none of them, and makes its own.
_pools: dict[int, ThreadPoolExecutor] = {}
os.register_at_fork(after_in_child=_pools.clear)


def in_parallel(tasks: Iterable[Task], num_threads: int) -> None:
    """Do all tasks, on this thread and up to `num_threads − 1` others, which stay for the next time."""
    if num_threads == 1:
        for task in tasks:
            task()
        return
    waiting = deque(tasks)
    num_others = min(num_threads, len(waiting)) - 1
    if num_others < 1:
        _do(waiting)
        return
    if num_others not in _pools:
        _pools[num_others] = ThreadPoolExecutor(num_others, thread_name_prefix="torchrec_cce.lookup")
    others = [_pools[num_others].submit(_do, waiting) for _ in range(num_others)]
    _do(waiting)
    for other in others:
        if not other.cancel():  # one that has not begun finds nothing left to do
            other.result()


def _do(waiting: deque[Task]) -> None:
    while True:
        try:
            task = waiting.popleft()
        except IndexError:
            return
        task()
