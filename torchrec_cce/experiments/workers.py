"""Who runs the trials: this process, or several that each run one at a time and are replaced when they die."""

from abc import ABC, abstractmethod
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType

import torch

from torchrec_cce.experiments.results import TrialResult
from torchrec_cce.experiments.trial import Trial, run_trial
from torchrec_cce.training.quiet import quiet_libraries
from torchrec_cce.workers.processes import WorkerContext, end_with_parent

_STOPPING_S = 30.0
"""Within which a run that was asked to stop writes its checkpoint."""
_DIED = "its process died: killed, or out of memory; run the plan again to try it again"


class Workers(ABC):
    """Trials go in one by one, as long as there is room, and come out as they end."""

    @property
    @abstractmethod
    def is_free(self) -> bool:
        """Whether another trial can begin."""

    @abstractmethod
    def begin(self, trial: Trial) -> None:
        """Begin a trial, if there is room."""

    @abstractmethod
    def ended(self) -> list[tuple[Trial, TrialResult]]:
        """Wait until a trial has ended; those that have. Empty if none was begun."""

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None


class Here(Workers):
    """One trial at a time in this process."""

    def __init__(self) -> None:
        self._trial: Trial | None = None

    @property
    def is_free(self) -> bool:
        return self._trial is None

    def begin(self, trial: Trial) -> None:
        self._trial = trial

    def ended(self) -> list[tuple[Trial, TrialResult]]:
        if self._trial is None:
            return []
        trial, self._trial = self._trial, None
        return [(trial, run_trial(trial))]


class Processes(Workers):
    """`count` processes of one thread each. They end with this one, however it ends.

    Each is a pool of its own, so that the one that is killed, or takes all the memory, takes only its own trial along.
    """

    def __init__(self, count: int) -> None:
        self._context = WorkerContext()
        self._idle = [self._pool() for _ in range(count)]
        self._running: dict[Future[TrialResult], tuple[Trial, ProcessPoolExecutor]] = {}

    @property
    def is_free(self) -> bool:
        return bool(self._idle)

    def begin(self, trial: Trial) -> None:
        pool = self._idle.pop()
        try:
            future = pool.submit(run_trial, trial)
        except BrokenProcessPool:  # it died without a trial
            pool = self._pool()
            future = pool.submit(run_trial, trial)
        self._running[future] = (trial, pool)

    def ended(self) -> list[tuple[Trial, TrialResult]]:
        done, _ = wait(self._running, return_when=FIRST_COMPLETED)
        return [self._end(future) for future in done]

    def _end(self, future: Future[TrialResult]) -> tuple[Trial, TrialResult]:
        trial, pool = self._running.pop(future)
        try:
            ended = future.result()
        except BrokenProcessPool:
            pool, ended = self._pool(), trial.result(_DIED)
        self._idle.append(pool)
        return trial, ended

    def _pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, self._context, _begin)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        started = [process for process in self._context.started if process.pid is not None]
        for process in started:
            process.terminate()  # one that trains leaves a checkpoint to go on from
        for pool in [*self._idle, *(pool for _, pool in self._running.values())]:
            pool.shutdown(wait=False, cancel_futures=True)
        for process in started:
            process.join(_STOPPING_S)
            process.kill()
            process.join()


def _begin() -> None:
    end_with_parent()
    torch.set_num_threads(1)
    quiet_libraries()
