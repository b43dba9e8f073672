"""Processes that start work at once: forks of a parent that has imported everything and has loaded its kernels.

`apart` starts the parent. It must not have used a registry before, because the threads of obstore do not survive a
fork.
"""

import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tests.support.launch import TIMEOUT, Job
from tests.support.registries import Recipe
from torchrec_cce.maps.snapshot import churn

T = TypeVar("T")


def apart(folder: Path, function: Callable[..., T], *, timeout: float = TIMEOUT, **arguments: Any) -> T:
    """What `function(**arguments)` returns in a process of its own, which may make a `Fork`.

    Args:
        folder: for its standard streams.
    """
    finished = Job(folder, partial(function, **arguments)).wait(timeout)
    assert finished.code == 0, finished.stderr
    value: T = finished.value
    return value


class Fork:
    """A process that runs `function(*args, say)`; its parent hears what the function says."""

    def __init__(self, function: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("fork")
        self._ours, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=function, args=(*args, theirs.send), daemon=True)
        self.process.start()
        theirs.close()

    def heard(self, timeout: float = TIMEOUT) -> Any:
        """What the process says next, or None if it ends first."""
        assert self._ours.poll(timeout), f"not a word within {timeout} s"
        try:
            return self._ours.recv()
        except EOFError:
            return None

    def kill(self) -> None:
        """SIGKILL, and wait until it is dead."""
        self.process.kill()
        self.process.join()


def warm_up() -> None:
    """Load the kernels that publishing and comparing tables need; takes most of a second."""
    before, after = (Recipe(seed=seed, num_ids=1).tables() for seed in (0, 1))
    for name in before:
        churn(before[name], after[name])
