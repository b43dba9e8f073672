"""Tasks on a Ray cluster; the only file that imports Ray."""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torchrec_cce.errors import JobError
from torchrec_cce.extras import require
from torchrec_cce.workers.engine import TICK_S, Engine, WorkerDied, next_tasks, result_of_lost
from torchrec_cce.workers.inline import InlineCounters

_ANSWER_S = 1.0

T = TypeVar("T")
Task = TypeVar("Task")
Result = TypeVar("Result")


class RayEngine(Engine):
    """An engine on the cluster that `RAY_ADDRESS` names, or on a Ray of this process's own.

    A process that is connected already stays connected. Shared values are in the nodes' object stores.

    Args:
        num_workers: tasks at a time, each with one CPU; None = as many as the cluster has CPUs.

    Raises:
        MissingExtraError: Ray is not installed.
    """

    def __init__(self, num_workers: int | None = None) -> None:
        self._ray: Any = require("ray", "ray")
        self._wanted = num_workers
        self._connected_here = False
        self._workers: list[Any] = []
        self._threads = 0
        self._counters: list[Any] = []

    def __enter__(self) -> "RayEngine":
        ray = self._ray
        if not ray.is_initialized():
            address = os.environ.get("RAY_ADDRESS", "local")
            own = {"num_cpus": self._wanted, "include_dashboard": False} if address == "local" else {}
            try:
                ray.init(address, logging_level=logging.ERROR, **own)
            except (ConnectionError, OSError, RuntimeError, ValueError) as error:
                raise JobError(f"no Ray at RAY_ADDRESS={address!r}: {error}; nothing was changed") from error
            self._connected_here = True
        self.num_workers = self._wanted or max(1, int(ray.cluster_resources().get("CPU", 1)))
        return self

    def __exit__(self, *_error: object) -> None:
        for actor in (*self._workers, *self._counters):
            self._ray.kill(actor)
        if self._connected_here:
            self._ray.shutdown()

    def share(self, value: T) -> "RayShared[T]":
        return RayShared(reference=self._ray.put(value))

    def counters(self, count: int) -> "RayCounters":
        """In an actor, which takes no CPU from the tasks."""
        actor = self._ray.remote(num_cpus=0)(InlineCounters).remote(count)
        self._counters.append(actor)
        return RayCounters(actor, count)

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
        free: list[Any] = []
        starting = {worker.start.remote(): worker for worker in self._workers_of(threads)}
        running: dict[Any, tuple[Any, Task]] = {}
        try:
            while True:
                for task in next_tasks(left, len(free)):
                    worker = free.pop(0)
                    running[worker.call.remote(function, task)] = worker, task
                if free and not running:
                    return
                found, _ = self._ray.wait([*running, *starting], timeout=None if tick is None else TICK_S)
                if tick is not None and not found:
                    tick()
                for done in found:
                    if done in starting:
                        free.append(starting.pop(done))
                        self._started(done)
                        continue
                    worker, task = running.pop(done)
                    free.append(worker)
                    try:
                        result: Result = self._answer(done)
                    except WorkerDied as death:
                        free.remove(worker)
                        self._workers.remove(worker)
                        result = result_of_lost(task, death, lost)
                        successor = self._workers_of(threads)[-1]
                        starting[successor.start.remote()] = successor
                    yield task, result
        finally:
            for worker, _ in running.values():
                self._workers.remove(worker)
                self._ray.kill(worker)

    def _workers_of(self, threads: int) -> list[Any]:
        """Actors, for Ray aborts the whole process when a task that it is told to cancel ends at that moment."""
        if threads != self._threads:
            while self._workers:
                self._ray.kill(self._workers.pop())
            self._threads = threads
        remote = self._ray.remote(num_cpus=threads)(_Worker)
        while len(self._workers) < self.num_workers // threads:
            self._workers.append(remote.remote())
        return self._workers

    def _started(self, reference: Any) -> None:
        try:
            self._answer(reference)
        except WorkerDied as death:
            result_of_lost("its start", death, None)

    def _answer(self, reference: Any) -> Any:
        """Wait for it. Raises what the task raised, or WorkerDied."""
        ray = self._ray
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise WorkerDied("a Ray worker", f"killed, or out of memory: {reason}") from error


@dataclass(frozen=True, kw_only=True)
class RayShared(Generic[T]):
    """A value in Ray's object store."""

    reference: Any

    def get(self) -> T:
        """The value, its arrays in the node's shared memory and read-only."""
        value: T = require("ray", "ray").get(self.reference)
        return value


class RayCounters:
    """Numbers that an actor of the cluster has, to which a task sends its own at most twice a second."""

    def __init__(self, actor: Any, count: int) -> None:
        self._actor = actor
        self._numbers = [0] * count
        self._next: float | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return RayCounters, (self._actor, 0)  # tasks do not read

    def set(self, start: int, *values: int) -> None:
        now = time.monotonic()
        if self._next is None or now < self._next:  # a short task has nothing to tell
            self._next = self._next or now + TICK_S
            return
        self._next = now + TICK_S
        self._actor.set.remote(start, *values)

    def read(self) -> list[int]:
        """What was read before while the actor does not answer: that somebody watches is no reason to fail."""
        ray = require("ray", "ray")
        with suppress(ray.exceptions.RayError):
            self._numbers = ray.get(self._actor.read.remote(), timeout=_ANSWER_S)
        return self._numbers


class _Worker:
    """The actor that does tasks, one at a time."""

    def start(self) -> None:
        """Answered once its process runs; while a busy cluster keeps it waiting, the others get the tasks."""

    def call(self, function: Callable[[Task], Result], task: Task) -> Result:
        return function(task)
