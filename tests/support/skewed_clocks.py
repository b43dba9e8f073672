"""Publishers at work while machines collect debris whose clocks are far ahead: no published version may lose a file."""

import multiprocessing
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo
from itertools import count
from multiprocessing.synchronize import Event

from tests.support.forks import Fork, warm_up
from tests.support.registries import Recipe, Target, broken_links
from torchrec_cce.errors import PublishConflictError, RegistryError
from torchrec_cce.maps import registry as registry_module
from torchrec_cce.maps.store.local_store import LocalStore
from torchrec_cce.maps.version_files import VersionFiles

_AHEAD = timedelta(hours=25)
_SMALL = Recipe(seed=1, num_ids=20)


@dataclass(frozen=True, kw_only=True)
class Skewed:
    """What came of it."""

    gcs: int
    """Collections that were carried out to the end."""
    taken: int
    """Pieces of debris that they took."""
    published: int
    conflicts: int
    """Publishers that had to begin anew."""
    violations: list[str]


def skewed_gcs(target: Target, *, publishers: int, collectors: int, gcs: int, seed: int) -> Skewed:
    """Let `collectors` carry out `gcs` collections meanwhile. To be run by `tests.support.forks.apart`."""
    warm_up()
    target.open().publish(_SMALL.tables(), checkpoint=_SMALL.note)
    stop = multiprocessing.get_context("fork").Event()
    at_work = [Fork(_publish, target, seed + number, stop) for number in range(publishers)]
    collecting = [Fork(_collect, target, -(-gcs // collectors)) for _ in range(collectors)]
    collected = [fork.heard() for fork in collecting]
    stop.set()
    done = [fork.heard() for fork in at_work]
    registry = target.open()
    history = registry.history()
    violations = [*map(str, registry.verify()), *broken_links(history)]
    violations += ["a process ended early" for heard in (*collected, *done) if heard is None]
    said = {version for heard in done if heard is not None for version in heard[0]}
    there = {entry.version for entry in registry.state().versions}
    violations += [f"version {version} was published and is not there" for version in sorted(said - there)]
    return Skewed(
        gcs=sum(heard[0] for heard in collected if heard is not None),
        taken=sum(heard[1] for heard in collected if heard is not None),
        published=len(said),
        conflicts=sum(heard[1] for heard in done if heard is not None),
        violations=violations,
    )


def _publish(target: Target, seed: int, stop: Event, say: Callable[[object], None]) -> None:
    registry, rng, conflicts = target.open(), random.Random(seed), 0
    published: list[int] = []
    whole = VersionFiles.are_whole

    def after_a_while(*arguments: object) -> bool:  # between the last look and the record
        found = whole(*arguments)  # type: ignore[arg-type]
        time.sleep(rng.random() * 0.05)
        return found

    VersionFiles.are_whole = after_a_while  # type: ignore[method-assign,assignment]
    for token in count():
        if stop.is_set():
            break
        recipe = _SMALL.derived(seed << 32 | token)
        try:
            published.append(registry.publish(recipe.tables(), checkpoint=recipe.note).version)
        except (PublishConflictError, RegistryError):
            conflicts += 1
    say((published, conflicts))


def _collect(target: Target, gcs: int, say: Callable[[object], None]) -> None:
    class Ahead(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + _AHEAD

    registry_module.datetime = Ahead  # type: ignore[attr-defined,misc]
    now = LocalStore.now
    LocalStore.now = lambda self: now(self) + _AHEAD  # type: ignore[method-assign]
    registry, rng, done, taken = target.open(), random.Random(os.getpid()), 0, 0
    while done < gcs:
        time.sleep(rng.random())  # else no publisher would ever come to an end
        try:
            taken += len(registry.gc(keep_last=10_000).debris)
        except PublishConflictError:
            continue
        done += 1
    say((done, taken))
