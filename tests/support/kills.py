"""Publishers that are killed with SIGKILL at random moments, and what a reader sees after each of them."""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tests.support.forks import Fork, warm_up
from tests.support.registries import Recipe, Target, content
from torchrec_cce.errors import MapFileError, RegistryError
from torchrec_cce.maps.registry import MapVersion, Registry
from torchrec_cce.maps.snapshot import TableSnapshot

NUM_IDS = 600_000
"""The large file has 9.6 MB, so that an object store gets it in several parts."""


@dataclass(kw_only=True)
class Outcome:
    """The results of a series of kills."""

    seconds: float = 0.0
    """The median duration of the publishes that were measured and not killed, which were one in ten."""
    kills: int = 0
    inside: int = 0
    """Kills that came before `publish` had returned."""
    through: int = 0
    """Versions that became current although their publisher was killed before it knew."""
    refused: int = 0
    """Errors of a failing store that publishers and readers met."""
    torn: list[str] = field(default_factory=list)
    """Descriptions of what a reader saw and should not have seen."""
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


def _successor(recipe: Recipe, token: int) -> Recipe:
    """A recipe with another number of columns: else a publish would mostly compare pointers, and be killed there."""
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
    """Open the current version in a new process, note its number, and note it as torn unless it is `allowed`."""
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
    """Say each error of the store; then say the version, its recipe, and whether its tables are those of the recipe."""
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
