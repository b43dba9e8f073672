"""A training job adopts what becomes current in a registry: on all ranks, at the same step."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer

from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.errors import CCEError
from torchrec_cce.maps.manifest import Provenance
from torchrec_cce.maps.registry import MapVersion, Registry
from torchrec_cce.modules.recluster import TableReport
from torchrec_cce.sharding.agreement import from_each_rank, on_first_rank
from torchrec_cce.sharding.recluster import adopt_sharded

T = TypeVar("T")

_PENDING, _READY, _FAILED = range(3)
_PATIENCE_S = 10.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Adoption:
    """The model has adopted another version; or it has not, for a reason."""

    version: int
    """That became current in the registry."""
    error: str | None
    """Why the model stays where it was."""
    reports: Mapping[str, TableReport] = field(default_factory=dict)
    """Table → what that did to it; empty if the model stays."""
    seconds: float
    """That training stood still for it."""


class VersionWatcher:
    """Lets a live model adopt each version that becomes current in a registry; also an older one after a rollback.

    Training never waits for the registry. Rank 0 looks at it in the background, and there all ranks open a version:
    it is fetched once a host, verified, and mapped. When every rank has done that, all adopt it at the same call of
    `adopt_current`. A version that some rank cannot open or that does not fit the model is left alone, with a warning.
    If the reason may pass, as a store that does not answer or a full disk does, it is tried again, without another
    warning.

    Every rank makes one and calls `adopt_current` and `published` in the same order. Leaving its context lets go of the
    registry.

    Args:
        registry: whose current version is adopted.
        version: the one that the model is at; None if it is at none, and then what is current is news.
        is_own: whether this job published a version. One that was killed may come back to a moment before it published;
            it is not to take that version for news.

    Example:
        >>> with VersionWatcher(registry, version=opened.version) as watcher:           # doctest: +SKIP
        ...     for step, batch in enumerate(batches):
        ...         train(batch)
        ...         if step % 100 == 0:
        ...             watcher.adopt_current(model, optimizer)
    """

    def __init__(
        self,
        registry: Registry,
        *,
        version: int | None = None,
        is_own: Callable[[Provenance], bool] = lambda _: False,
    ) -> None:
        self.version = version
        """The newest that this job knows of: it moved there, published it, or cannot use it. The same on all ranks; it
        belongs into the job's checkpoints."""
        self._registry, self._is_own = registry, is_own
        self._look: Future[_Look] | None = None
        self._current: int | None = version
        self._opening: tuple[int, Future[MapVersion]] | None = None
        self._told_of_version: int | None = None
        self._told_of_silence = False

    def adopt_current(
        self,
        model: DistributedModelParallel,
        optimizer: KeyedOptimizer,
        *,
        before: Callable[[MapVersion], object] = lambda _: None,
        settings: ReclusterConfig | None = None,
    ) -> Adoption | None:
        """Let the model adopt the current version (`adopt_sharded`), if that is another and all ranks have it open.

        Call it between two steps, every so many: it exchanges three numbers a rank. A version is seen at the second
        call after it was published, and moved to when it has been fetched.

        Args:
            before: called on all ranks when a move is due, with a batch in flight or not: to drain a pipeline, or to
                refuse the version by one of our errors, on all ranks alike.
            settings: for `adopt_sharded`.

        Returns:
            None if there is no news, or none yet that all ranks have open.
        """
        due = self._due()
        if due is None:
            return None
        version, opened, failure = due
        started = time.perf_counter()
        reports: Mapping[str, TableReport] = {}
        if opened is not None:
            try:
                before(opened)
                reports = adopt_sharded(model, optimizer, opened.tables, settings=settings)
            except (CCEError, OSError) as error:
                failure = on_first_rank(partial(_Failure.of, error))
        seconds = time.perf_counter() - started
        if failure is None:
            self.version, self._told_of_version = version, None
            return Adoption(version=version, error=None, reports=reports, seconds=seconds)
        if not failure.may_pass:
            self.version = version
        if self._told_of_version == version:
            return None
        self._told_of_version = version
        if dist.get_rank() == 0:
            _log.warning("the model does not move to version %d: %s", version, failure.reason)
        return Adoption(version=version, error=failure.reason, seconds=seconds)

    def published(self, version: int) -> None:
        """The job itself has published, as this version, what it trains with."""
        self.version = self._current = version
        self._look = None  # it may have seen what was current before

    def __enter__(self) -> "VersionWatcher":
        return self

    def __exit__(self, *_: object) -> None:
        pending: list[Future[Any] | None] = [self._look, None if self._opening is None else self._opening[1]]
        wait([future for future in pending if future is not None], timeout=_PATIENCE_S)

    def _due(self) -> tuple[int, MapVersion | None, "_Failure | None"] | None:
        """Another version than the model's that is current: once it is open on all ranks, or failed to open on one."""
        current = self._news() if dist.get_rank() == 0 else None
        status = _PENDING if self._opening is None else _status(self._opening[1])
        everyones = [torch.empty(3, dtype=torch.int64) for _ in range(dist.get_world_size())]
        dist.all_gather(everyones, torch.tensor([self.version or 0, current or 0, status]))
        first, *_ = numbers = [each.tolist() for each in everyones]
        self.version = first[0] or None
        wanted = first[1]
        if wanted in (0, first[0]):
            self._opening = None
            return None
        if self._opening is None or self._opening[0] != wanted:
            self._opening = (wanted, _in_background(lambda: self._registry.open(wanted)))
            return None
        statuses = {status for *_, status in numbers}
        if _FAILED not in statuses and _PENDING in statuses:
            return None
        opening, self._opening = self._opening[1], None
        if _FAILED not in statuses:
            return wanted, opening.result(), None
        error = opening.exception() if opening.done() else None
        failures = from_each_rank(None if error is None else _Failure.of(error))
        return wanted, None, next(failure for failure in failures if failure is not None)

    def _news(self) -> int | None:
        """What rank 0 has last seen to be current. Looks again for the next time."""
        if self._look is not None and self._look.done():
            look, self._look = self._look, None
            error = look.exception()
            if error is None:
                self._current, is_own = look.result()
                if is_own and (self._current or 0) > (self.version or 0):
                    self.version = self._current
            elif not self._told_of_silence:
                _log.warning("no news from the registry, training goes on: %s", _Failure.of(error).reason)
            self._told_of_silence = error is not None
        if self._look is None:
            self._look = _in_background(self._see)
        return self._current

    def _see(self) -> "_Look":
        known, current = self.version, self._registry.state().current
        is_news = current is not None and current != known
        return _Look(current, is_news and self._is_own(self._registry.manifest(current).provenance))


class _Look(NamedTuple):
    current: int | None
    is_own: bool
    """Where it is news."""


class _Failure(NamedTuple):
    """Why a version is not moved to, as ranks tell each other."""

    reason: str
    may_pass: bool

    @classmethod
    def of(cls, error: BaseException) -> "_Failure":
        return cls(f"{' '.join(str(error).split()) or type(error).__name__}", isinstance(error, OSError))


def _in_background(function: Callable[[], T]) -> "Future[T]":
    """In a daemon: a store that hangs does not keep a process alive that is done."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except Exception as error:  # noqa: BLE001  raised by `result`
            future.set_exception(error)

    threading.Thread(target=work, name="version-watcher", daemon=True).start()
    return future


def _status(future: "Future[MapVersion]") -> int:
    return _PENDING if not future.done() else _READY if future.exception() is None else _FAILED
