"""Publishers that are killed with SIGKILL at random moments, and what a reader sees after each of them."""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.support.chain import broken_links
from tests.support.forks import Fork, warm_up
from tests.support.recipe import Recipe, content
from torchrec_cce.errors import MapFileError, RegistryError
from torchrec_cce.maps.manifest import MANIFEST
from torchrec_cce.maps.registry import MapVersion, Registry
from torchrec_cce.maps.snapshot import TableSnapshot

NUM_IDS = 600_000
"""The large file has 9.6 MB, so that an object store gets it in several parts."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A registry that any process can open."""

    url: str
    cache: Path
    options: dict[str, Any] = field(default_factory=dict)

    def open(self) -> Registry:
        return Registry(self.url, cache=self.cache, **self.options)


@dataclass(kw_only=True)
class Outcome:
    """What a series of kills led to."""

    seconds: float = 0.0
    """Median of the publishes that were measured and not killed, one in ten."""
    kills: int = 0
    inside: int = 0
    """Kills that came before `publish` had returned."""
    through: int = 0
    """Versions that became current although their publisher was killed before it knew."""
    refused: int = 0
    """Errors of a store that fails, met by publishers and readers."""
    torn: list[str] = field(default_factory=list)
    """What a reader saw and should not have."""
    current: int = 0
    recipe: Recipe
    """Of the current version."""


def kill_publishers(target: Target, *, kills: int, seed: int) -> Outcome:
    """Kill publishers at moments drawn evenly from 0 to 1.1 times what a publish took, and read after each.

    To be run by `tests.support.forks.apart`, on an empty registry.
    """
    warm_up()
    rng = random.Random(seed)
    outcome = Outcome(recipe=Recipe(seed=seed, num_ids=NUM_IDS))
    durations: list[float] = []
    while len(durations) < 5:
        _measure(target, outcome, durations)
    for number in range(kills):
        if number % 10 == 9:  # the load of the machine changes
            _measure(target, outcome, durations)
        fresh = _successor(outcome.recipe, number)
        publisher = _publisher(target, fresh)
        time.sleep(rng.uniform(0, 1.1 * rng.choice(durations[-5:])))
        publisher.kill()
        said, before = publisher.heard(), outcome.current
        allowed = {before + 1: fresh}
        if not isinstance(said, float):
            allowed[before] = outcome.recipe
        _read(target, outcome, allowed)
        outcome.kills += 1
        outcome.inside += said is None
        outcome.refused += isinstance(said, str)
        outcome.through += said is None and outcome.current > before
    outcome.seconds = statistics.median(durations)
    return outcome


def damage(registry: Registry) -> list[str]:
    """What is wrong with a registry once all is over, all of it read."""
    opened = registry.open(verify="all")
    wrong = [] if content(opened.tables) == content(Recipe.noted_in(opened.manifest).tables()) else ["other content"]
    return [*wrong, *broken_links(registry.history()), *map(str, registry.verify())]


def strays(registry: Registry, root: Path | None) -> set[str]:
    """What is in a registry, a folder or (`root=None`) a store, and is neither a record nor a file of a version."""
    if root is None:
        there = {one.name for folder in ("versions", "log") for one in registry._store.objects(folder)}
    else:
        there = {path.relative_to(root).as_posix() for path in root.rglob("*")}
    known = {"versions", "log", *(f"log/{one.sequence:020d}.json" for one in registry.history())}
    for entry in registry.state().versions:
        names = [file.name for file in registry.manifest(entry.version).files()]
        known |= {entry.folder, *(f"{entry.folder}/{name}" for name in [MANIFEST, *names])}
    return there - known


def _successor(recipe: Recipe, token: int) -> Recipe:
    """Of other columns: to compare the pointers would take most of a publish, and most kills would hit just that."""
    return replace(recipe.derived(token), num_columns=17 - recipe.num_columns)


def _measure(target: Target, outcome: Outcome, durations: list[float]) -> None:
    """Publish without a kill, and note how long that takes."""
    publisher = _publisher(target, _successor(outcome.recipe, -1))
    if isinstance(took := publisher.heard(), float):
        durations.append(took)
    _read(target, outcome, None)


def _publisher(target: Target, recipe: Recipe) -> Fork:
    """A process that is about to publish."""
    publisher = Fork(_publish, target, recipe.tables(), recipe.note)
    assert publisher.heard() == "ready"
    return publisher


def _publish(target: Target, tables: dict[str, TableSnapshot], note: str, say: Callable[[object], None]) -> None:
    """Say "ready", publish, and say how many seconds it took, or what went wrong."""
    registry = target.open()
    say("ready")
    started = time.monotonic()
    try:
        registry.publish(tables, checkpoint=note)
    except RegistryError as error:
        say(str(error))
    else:
        say(time.monotonic() - started)


def _read(target: Target, outcome: Outcome, allowed: dict[int, Recipe] | None) -> None:
    """Open the current version in a new process, and note which it is and whether it is one that is `allowed`."""
    reader = Fork(_open, target)
    while isinstance(heard := reader.heard(), RegistryError):
        outcome.refused += 1
    if not isinstance(heard, tuple):
        outcome.torn.append(f"the reader ended with {heard}")
        return
    outcome.current, outcome.recipe, whole = heard
    if not whole:
        outcome.torn.append(f"version {outcome.current} is not what its publisher meant")
    if allowed is not None and allowed.get(outcome.current) != outcome.recipe:
        outcome.torn.append(f"version {outcome.current} is current; {sorted(allowed)} may be")


def _open(target: Target, say: Callable[[object], None]) -> None:
    """Say each error of the store, then version, recipe and whether it holds what the recipe makes."""
    registry, opened = target.open(), None
    while opened is None:
        opened = _try_to_open(registry, say)
    recipe = Recipe.noted_in(opened.manifest)
    say((opened.version, recipe, content(opened.tables) == content(recipe.tables())))


def _try_to_open(registry: Registry, say: Callable[[object], None]) -> MapVersion | None:
    try:
        return registry.open(verify="all")
    except RegistryError as error:
        say(error)
        return None
    except MapFileError as error:
        say(error)
        raise
