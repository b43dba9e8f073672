"""Whether what several processes saw of a registry's journal could have come of one step after the other."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TypeAlias

from tests.support.forks import Fork
from torchrec_cce.errors import PublishConflictError, RegistryError
from torchrec_cce.maps.journal import Journal
from torchrec_cce.maps.store import open_store


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A call, and what came of it. Times are those of a clock that all processes share."""

    began: float
    ended: float = inf
    """Infinite if its process was killed, or does not know what came of it: then it may have been done or not."""
    expected: int | None = None
    """The record that was stepped from; None if this only reads."""
    found: int | None = None
    """The newest record that was read, or the one that was written; None if it is not known."""


def is_linearizable(history: Sequence[Operation]) -> bool:
    """Whether there is an order of the operations that explains all results, in which none comes before one that had
    ended when it began. (Wing and Gong's search, with the memory of Lowe's.)"""
    ended = sorted((each for each in history if each.ended != inf), key=lambda each: each.began)
    # A read that nobody heard of explains itself.
    open_steps = [each for each in history if each.ended == inf and each.expected is not None]
    # How many are done without a gap, which are done beyond these, which of the open steps are done, the newest record.
    State: TypeAlias = tuple[int, frozenset[int], frozenset[int], int]
    todo: list[State] = [(0, frozenset(), frozenset(), 0)]
    seen = set(todo)
    while todo:
        start, beyond, opened, newest = todo.pop()
        while start in beyond:
            start, beyond = start + 1, beyond - {start}
        if start == len(ended):
            return True
        nexts: list[State] = []
        first_end = inf
        for number in range(start, len(ended)):
            operation = ended[number]
            if operation.began > first_end:
                break
            if number in beyond:
                continue
            first_end = min(first_end, operation.ended)
            after = _after(operation, newest)
            if after is not None:
                nexts.append((start, beyond | {number}, opened, after))
        nexts += [
            (start, beyond, opened | {number}, newest + 1)
            for number, step in enumerate(open_steps)
            if number not in opened and step.expected == newest and step.began <= first_end
        ]
        todo += [state for state in nexts if state not in seen]
        seen.update(nexts)
    return False


def _after(operation: Operation, newest: int) -> int | None:
    """The newest record after an operation that ended; None if its result was another than it would then have."""
    if operation.expected is None:
        return newest if operation.found == newest else None
    return newest + 1 if (operation.expected, operation.found) == (newest, newest + 1) else None


def histories(registry: Path, *, processes: int, seconds: float, seed: int, kills: int) -> list[Operation]:
    """What processes saw that step and read for so many seconds, of which some are killed and replaced.

    To be run by `tests.support.forks.apart`.
    """
    rng, found = random.Random(seed), []
    deadline = time.monotonic() + seconds
    forks = [Fork(_work, registry, seed + number, deadline) for number in range(processes)]
    for number in range(kills):
        time.sleep(seconds / (kills + 1))
        chosen = rng.randrange(processes)
        forks[chosen].kill()
        found += _heard(forks[chosen])
        forks[chosen] = Fork(_work, registry, seed + processes + number, deadline)
    for fork in forks:
        found += _heard(fork)
    return found


def _heard(fork: Fork) -> list[Operation]:
    """All that a process has said; what it had only begun is of an open end."""
    found: list[Operation] = []
    begun: Operation | None = None
    while (said := fork.heard()) is not None:
        if begun is not None:
            found.append(said)
        begun = said if begun is None else None
    return found if begun is None else [*found, begun]


def _work(folder: Path, seed: int, deadline: float, say: Callable[[Operation], None]) -> None:
    """Say each operation twice: when it begins, and when it is done."""
    journal, rng = Journal(open_store(folder)), random.Random(seed)
    state = journal.state() if folder.exists() else None
    while time.monotonic() < deadline:
        time.sleep(rng.uniform(0, 0.004))
        began = time.monotonic()
        if state is None or rng.random() < 0.5:
            say(Operation(began=began))
            state = journal.state()
            say(Operation(began=began, ended=time.monotonic(), found=state.sequence))
            continue
        expected = state.sequence
        say(Operation(began=began, expected=expected))
        try:
            state = journal.append(state, state)
            say(Operation(began=began, ended=time.monotonic(), expected=expected, found=state.sequence))
        except PublishConflictError:  # it has changed nothing; that there is a later record is all that it has read
            say(Operation(began=began))
            state = None
        except RegistryError:
            say(Operation(began=began, expected=expected))
            state = None
