"""What every engine offers: it runs tasks, shares values with them, and lets them count."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Protocol, TypeVar

from torchrec_cce.errors import JobError

TICK_S = 0.5
"""How often an engine lets its caller look at the progress. People do not see more."""

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Task = TypeVar("Task")
Result = TypeVar("Result")
EngineType = TypeVar("EngineType", bound="Engine")


class Shared(Protocol[T_co]):
    """A value that every worker can get, sent once to each node. It is cheap to pickle; its engine keeps it.

    numpy arrays in it are read-only in the workers, and one copy serves all workers of a node.
    """

    def get(self) -> T_co: ...


class Counters(Protocol):
    """Numbers that tasks set while they work, zero at first. They are picklable; their engine keeps them."""

    def set(self, start: int, *values: int) -> None:
        """Called by a task: set the numbers from `start` on, which no other task sets. It may be called often."""
        ...

    def read(self) -> list[int]:
        """All numbers as they were some moments ago, those of one `set` together."""
        ...


class Engine(ABC):
    """Workers, each with one thread for arithmetic. A context manager: on exit workers and shared values are gone."""

    num_workers: int
    """Once entered: how many threads all tasks in work may use together."""

    @abstractmethod
    def share(self, value: T) -> Shared[T]:
        """Make `value` (picklable) available to all workers."""

    @abstractmethod
    def counters(self, count: int) -> Counters:
        """`count` numbers that tasks set."""

    @abstractmethod
    def run(
        self,
        function: Callable[[Task], Result],
        tasks: Iterable[Task | None],
        *,
        threads: int = 1,
        tick: Callable[[], object] | None = None,
        lost: Callable[[Task], Result] | None = None,
    ) -> Iterator[tuple[Task, Result]]:
        """Call `function` on each of `tasks`: pairs of task and result, in the order in which they are done.

        Tasks are taken and begun in their order, each when a worker is free and the caller has seen the results so far.
        So `tasks` may depend on those: None says that the next task is not known yet. It is asked for again after
        another result; where no task is in work, the run ends.

        Args:
            function: of a module, so that workers find it by its name.
            tasks: picklable; `str(task)` is how an error names one.
            threads: that each task starts, at most `num_workers`: so many fewer of them run at a time.
            tick: called about every `TICK_S` while there is no result. Engines with workers call it in this thread.
            lost: the result of a task whose worker vanished; another worker takes its place. None ends the run instead.

        Raises:
            JobError: a worker vanished, for example killed or out of memory, and `lost` is None.
            Exception: what a task raised, as it was raised there. No other task is begun.
        """

    def __enter__(self: EngineType) -> EngineType:
        return self

    @abstractmethod
    def __exit__(self, *_error: object) -> None: ...


def next_tasks(tasks: Iterator[Task | None], count: int | None) -> Iterator[Task]:
    """The tasks that can begin now, at most `count` (None = all)."""
    for task in islice(tasks, count):
        if task is None:
            return
        yield task


class WorkerDied(Exception):
    """A worker has ended before it answered. Engines tell their callers by `result_of_lost`."""

    def __init__(self, worker: str, reason: str = "killed, or out of memory") -> None:
        super().__init__(f"{worker} vanished ({reason})")


def result_of_lost(task: Task, death: WorkerDied, lost: Callable[[Task], Result] | None) -> Result:
    """The result of a task whose worker died. Raises JobError if `lost` is None."""
    if lost is None:
        raise JobError(f"{death} while it worked on: {task}; nothing was changed, run the job again") from death
    return lost(task)
