"""Where a job's tasks run: in processes of this machine, or on a Ray cluster."""

from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Literal, Protocol, TypeVar, get_args

from torchrec_cce.errors import ConfigError
from torchrec_cce.workers.counters import Counters
from torchrec_cce.workers.local import LocalEngine
from torchrec_cce.workers.ray import RayEngine

EngineName = Literal["local", "ray"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Task = TypeVar("Task")
Result = TypeVar("Result")


class Shared(Protocol[T_co]):
    """A value that every worker can get, sent once to each node. It is cheap to pickle; its engine keeps it.

    numpy arrays in it are read-only in the workers, and one copy serves all workers of a node.
    """

    def get(self) -> T_co: ...


class Engine(Protocol):
    """Workers, each with one thread for arithmetic. A context manager: on exit workers and shared values are gone."""

    @property
    def num_workers(self) -> int: ...

    def share(self, value: T) -> Shared[T]:
        """Make `value` (picklable) available to all workers."""
        ...

    def counters(self, count: int) -> Counters:
        """So many numbers that tasks set."""
        ...

    def run(
        self,
        function: Callable[[Task], Result],
        tasks: Iterable[Task],
        *,
        threads: int = 1,
        tick: Callable[[], object] | None = None,
    ) -> Iterator[tuple[Task, Result]]:
        """Call `function` on each of `tasks`: pairs of task and result, in the order in which they are done.

        Tasks are taken and begun in their order, each when a worker is free.

        Args:
            function: of a module, so that workers find it by its name.
            tasks: picklable; `str(task)` is how an error names one.
            threads: that each task starts, at most `num_workers`: so many fewer of them run at a time.
            tick: called in this thread whenever `TICK_S` have passed without a result.

        Raises:
            JobError: a worker vanished, for example killed or out of memory.
            Exception: what a task raised, as it was raised there. No other task is begun.
        """
        ...

    def __enter__(self) -> "Engine": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def engine_of(name: EngineName, *, num_workers: int | None = None) -> Engine:
    """The engine called `name`, not yet entered.

    Args:
        name: `"local"`, processes of this machine; `"ray"`, the cluster that `RAY_ADDRESS` names, or else a Ray of this
            process's own.
        num_workers: None = one a core, of the machine or of the cluster.

    Raises:
        ConfigError: an unknown name, or `num_workers < 1`.
        MissingExtraError: Ray is not installed.
    """
    if name not in get_args(EngineName):
        raise ConfigError(f"engine={name!r} is not one of {', '.join(get_args(EngineName))}")
    if num_workers is not None and num_workers < 1:
        raise ConfigError(f"num_workers={num_workers} is not at least 1")
    return LocalEngine(num_workers) if name == "local" else RayEngine(num_workers)
