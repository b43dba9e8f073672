"""Tasks on a Ray cluster; the only file that imports Ray."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Any, Generic, TypeVar

from torchrec_cce.errors import JobError
from torchrec_cce.extras import require

_ENDING_S = 10.0

T = TypeVar("T")
Task = TypeVar("Task")
Result = TypeVar("Result")


class RayEngine:
    """An engine on the cluster that `RAY_ADDRESS` names, or on a Ray of this process's own; see
    `torchrec_cce.jobs.engine.Engine`.

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._connected_here:
            self._ray.shutdown()

    def share(self, value: T) -> "RayShared[T]":
        return RayShared(reference=self._ray.put(value))

    def run(
        self, function: Callable[[Task], Result], tasks: Iterable[Task], *, threads: int = 1
    ) -> Iterator[tuple[Task, Result]]:
        ray = self._ray
        remote = ray.remote(num_cpus=threads, max_retries=0)(function)
        left = iter(tasks)
        pending: dict[Any, Task] = {}
        try:
            while True:
                for task in islice(left, 2 * (self.num_workers // threads) - len(pending)):
                    pending[remote.remote(task)] = task
                if not pending:
                    return
                (done,), _ = ray.wait(list(pending), num_returns=1)
                result = self._result(done, pending[done])
                yield pending.pop(done), result
        finally:
            for reference in pending:
                ray.cancel(reference, force=True)
            if pending:  # or a next task might get one of the workers that are being ended
                ray.wait(list(pending), num_returns=len(pending), timeout=_ENDING_S, fetch_local=False)

    def _result(self, reference: Any, task: object) -> Any:
        ray = self._ray
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise JobError(
                f"a Ray worker vanished (killed, or out of memory) while it worked on: {task} ({reason}); nothing was "
                "changed, run the job again"
            ) from error


@dataclass(frozen=True, kw_only=True)
class RayShared(Generic[T]):
    """A value in Ray's object store."""

    reference: Any

    def get(self) -> T:
        """The value, its arrays in the node's shared memory and read-only."""
        value: T = require("ray", "ray").get(self.reference)
        return value
