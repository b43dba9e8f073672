"""Tasks on threads, and forks of a process that has some."""

import os
import threading
from functools import partial

import pytest

from torchrec_cce.kernels.lookup.threads import in_parallel


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("num_tasks", [0, 1, 7])
def test_every_task_is_done_once(num_threads: int, num_tasks: int) -> None:
    done: list[int] = []
    in_parallel([partial(done.append, i) for i in range(num_tasks)], num_threads)
    assert sorted(done) == list(range(num_tasks))


def test_two_tasks_run_at_once() -> None:
    both = threading.Barrier(2, timeout=60)
    in_parallel([both.wait, both.wait], 2)


def test_an_error_is_raised() -> None:
    def fail() -> None:
        raise ValueError("of a task")

    with pytest.raises(ValueError, match="of a task"):
        in_parallel([fail] * 4, 2)


def test_a_fork_makes_threads_of_its_own() -> None:
    both = threading.Barrier(2, timeout=20)
    in_parallel([both.wait, both.wait], 2)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            both = threading.Barrier(2, timeout=20)
            in_parallel([both.wait, both.wait], 2)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
