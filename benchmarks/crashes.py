"""Kills, calls that fail, and power cuts: tries and violations."""

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch

from benchmarks.figure import report
from tests.support import nights, scenes
from tests.support.failing_calls import Scene, calls_of, some_of, sweep
from tests.support.forks import apart
from tests.support.kills import kill_publishers
from tests.support.linearizability import histories, is_linearizable
from tests.support.power_loss import cut_at_every_call
from tests.support.registries import Target

_KILLS = 300
_MOST_CALLS = 400
"""Of one kind; a checkpoint is written in more pieces than that."""
_POWER_CUTS = 60
"""Moments of each kind, with four disks each."""


def crash_figures() -> None:
    """About eight minutes on two cores."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    _kills()
    _journal_histories()
    with tempfile.TemporaryDirectory() as scratch:
        run = nights.train_a_run(Path(scratch))
        for name, make in _scenes(run).items():
            _failing_calls(name, make)
        for name in ("publish", "first publish", "checkpoint"):
            _power_cuts(name, _scenes(run)[name])


def _scenes(run: Path) -> dict[str, Callable[[Path], AbstractContextManager[Scene]]]:
    return {
        "publish": lambda folder: nullcontext(scenes.publishing(folder)),
        "first publish": lambda folder: nullcontext(scenes.publishing(folder, first=True)),
        "gc": lambda folder: nullcontext(scenes.collecting(folder)),
        "remap": lambda folder: nullcontext(scenes.remapping(folder)),
        "recluster": lambda folder: nullcontext(scenes.reclustering(folder, run)),
        "checkpoint": lambda folder: scenes.saving(folder, run),
    }


@contextmanager
def _staged(make: Callable[[Path], AbstractContextManager[Scene]]) -> Iterator[tuple[Scene, Path]]:
    with tempfile.TemporaryDirectory() as folder, make(Path(folder) / "scene") as scene:
        (Path(folder) / "scratch").mkdir()
        yield scene, Path(folder) / "scratch"


def _kills() -> None:
    with tempfile.TemporaryDirectory() as folder:
        target = Target(url=f"{folder}/registry", cache=Path(folder) / "cache")
        outcome = apart(Path(folder) / "job", kill_publishers, timeout=900, target=target, kills=_KILLS, seed=0)
    _report("killed publishers", outcome.kills, outcome.torn, f"{outcome.inside} of them inside `publish`")


def _journal_histories() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = apart(
            Path(folder) / "job", histories, registry=Path(folder) / "log", processes=4, seconds=20, seed=0, kills=60
        )
    wrong = [] if is_linearizable(found) else ["no order of the steps explains what was read"]
    _report("history of a journal", len(found), wrong, "4 processes, 60 of them killed and replaced")


def _failing_calls(name: str, make: Callable[[Path], AbstractContextManager[Scene]]) -> None:
    with _staged(make) as (scene, scratch):
        calls = calls_of(scene, scratch)
        found = sweep(scene, scratch, numbers=some_of(calls, min(calls, _MOST_CALLS)))
    _report(
        f"failed calls of a {name}", found.tries, found.violations, f"of {calls}; {found.failed} ended with an error"
    )


def _power_cuts(name: str, make: Callable[[Path], AbstractContextManager[Scene]]) -> None:
    with _staged(make) as (scene, scratch):
        step = max(1, calls_of(scene, scratch) // _POWER_CUTS)
        looked, wrong = cut_at_every_call(scene, scratch, tries=2, seed=0, step=step)
    _report(f"power cuts in a {name}", looked, wrong, "the least that is on the disk, names alone, and some by chance")


def _report(attack: str, tries: int, violations: list[str], against: str) -> None:
    for line in violations:
        print(line)
    report(
        f"{attack}: violations", len(violations), target="0", holds=not violations, against=f"{tries} tries; {against}"
    )


if __name__ == "__main__":
    crash_figures()
