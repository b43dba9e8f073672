"""Many publishers and readers on one registry at the same time: no update may be lost, and no read torn."""

import multiprocessing
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.synchronize import Barrier
from pathlib import Path

from tests.support.forks import Fork, warm_up
from tests.support.registries import Recipe, Target, broken_links, content
from torchrec_cce.errors import MapFileError, PublishConflictError, RegistryError
from torchrec_cce.maps.registry import MapVersion, Registry

NUM_IDS = 2000
_KEEP_LAST = 2
_FIRST = Recipe(seed=0, num_ids=NUM_IDS)


@dataclass(kw_only=True)
class Tally:
    """What one process did, or all of them together."""

    published: dict[int, Recipe] = field(default_factory=dict)
    """Version → what the process was told it had published."""
    uncertain: set[Recipe] = field(default_factory=set)
    """What may or may not have been published, because the store failed."""
    conflicts: int = 0
    other_steps: int = 0
    """Rollbacks, pins, unpins and collections."""
    opens: int = 0
    refused: int = 0
    """Opens that ended with an error of the store, or because the version was collected meanwhile."""
    torn: list[str] = field(default_factory=list)
    """Opens that gave something that no publisher had meant."""

    def add(self, other: "Tally") -> None:
        twice = self.published.keys() & other.published.keys()
        self.torn += [f"two processes were told that they published version {version}" for version in twice]
        self.published |= other.published
        self.uncertain |= other.uncertain
        self.conflicts += other.conflicts
        self.other_steps += other.other_steps
        self.opens += other.opens
        self.refused += other.refused
        self.torn += other.torn


def begin(target: Target) -> None:
    """Publish the first version, which a crowd starts from."""
    target.open().publish(_FIRST.tables(), checkpoint=_FIRST.note)


def crowd(target: Target, *, publishers: int, readers: int, seconds: float, seed: int) -> Tally:
    """Let publishers and readers use a registry for so many seconds. To be run by `tests.support.forks.apart`."""
    warm_up()
    deadline = time.time() + seconds
    roles = [_publish] * publishers + [_read] * readers
    forks = [Fork(role, target, seed + number, deadline) for number, role in enumerate(roles)]
    total = Tally(published={1: _FIRST})
    for number, fork in enumerate(forks):
        tally = fork.heard(seconds + 60)
        if tally is None:
            total.torn.append(f"process {number} ended early")
        else:
            total.add(tally)
    return total


def lost_updates(registry: Registry, tally: Tally) -> list[str]:
    """The places where a registry's history differs from what its publishers did, one after the other."""
    history = registry.history()
    lost = broken_links(history)
    recorded = {record.subject: record for record in history if record.action == "publish"}
    lost += [f"version {version} is not in the history" for version in tally.published.keys() - recorded.keys()]
    unclaimed = len(recorded.keys() - tally.published.keys())
    if unclaimed > len(tally.uncertain):
        lost.append(f"{unclaimed} versions that nobody published, {len(tally.uncertain)} publishers do not know")
    for version, recipe in tally.published.items():
        parent = recorded[version].versions[-1].parent if version in recorded else None
        known = None if parent is None else tally.published.get(parent)
        if known is not None and known.seed != recipe.parent_seed:
            lost.append(f"version {version} was not made from its parent, version {parent}")
    return lost


def open_at_once(target: Target, *, processes: int) -> list[tuple[set[str], float, float]]:
    """For each process: the map files that it has mapped (device and inode), and when its open began and ended.

    To be run by `tests.support.forks.apart`.
    """
    warm_up()
    gate = multiprocessing.get_context("fork").Barrier(processes)
    forks = [Fork(_open_once, target, gate) for _ in range(processes)]
    return [fork.heard() for fork in forks]


def _open_once(target: Target, gate: Barrier, say: Callable[[object], None]) -> None:
    registry = target.open()
    gate.wait()
    began = time.monotonic()
    opened = registry.open()
    done = time.monotonic()
    assert content(opened.tables) == content(Recipe.noted_in(opened.manifest).tables())
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(".arrow")]
    say(({f"{device} {inode}" for _, _, _, device, inode, _ in lines}, began, done))


def _publish(target: Target, seed: int, deadline: float, say: Callable[[Tally], None]) -> None:
    registry, rng, tally = target.open(), random.Random(seed), Tally()
    for token in count():
        if time.time() > deadline:
            break
        opened = _open(registry, tally)
        if opened is None:
            continue
        recipe = Recipe.noted_in(opened.manifest).derived(seed << 32 | token)
        try:
            entry = registry.publish(recipe.tables(), parent=opened.version, checkpoint=recipe.note)
            tally.published[entry.version] = recipe
        except PublishConflictError:
            tally.conflicts += 1
        except RegistryError:
            tally.uncertain.add(recipe)
        if rng.random() < 0.3:
            _other_step(registry, rng, tally)
    say(tally)


def _other_step(registry: Registry, rng: random.Random, tally: Tally) -> None:
    try:
        version = rng.choice(registry.state().versions).version
        match rng.randrange(4):
            case 0:
                registry.rollback(version)
            case 1:
                registry.pin(version)
            case 2:
                registry.pin(version, pinned=False)
            case _:
                registry.gc(keep_last=_KEEP_LAST)
        tally.other_steps += 1
    except PublishConflictError:
        tally.conflicts += 1
    except RegistryError:
        tally.refused += 1


def _read(target: Target, _: int, deadline: float, say: Callable[[Tally], None]) -> None:
    registry, tally = target.open(), Tally()
    while time.time() < deadline:
        _open(registry, tally)
    say(tally)


def _open(registry: Registry, tally: Tally) -> MapVersion | None:
    """The current version, found to be what its publisher meant; None if there is none to be had."""
    try:
        opened = registry.open(verify="all")
    except MapFileError as error:
        tally.torn.append(str(error))
        return None
    except RegistryError:
        tally.refused += 1
        return None
    recipe = Recipe.noted_in(opened.manifest)
    if content(opened.tables) != content(recipe.tables()):
        tally.torn.append(f"{opened.identity} is not what its publisher meant")
    tally.opens += 1
    return opened
