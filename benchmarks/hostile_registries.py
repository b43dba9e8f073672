"""Attacks on registries: tries, and violations of what this package promises. The names of attacks are figures."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.figure import report
from tests.support.forks import apart
from tests.support.hostile_registries import attack
from tests.support.registries import Target
from tests.support.skewed_clocks import skewed_gcs


def hostile_registries(tries: int = 100) -> None:
    """Registries with damaged journals, stray files, pointers and positions beyond their tables, names with escape
    sequences, links, pipes, paths that lead out, and numbers without measure."""
    with _folder() as folder:
        said = [line for number in range(tries) for line in attack(folder / str(number), number)]
    _report("hostile registries", tries, said, "opened, verified, printed and collected")


def skewed_clocks(gcs: int = 60) -> None:
    """`gc` on machines whose clocks are 25 hours ahead, while others publish."""
    with _folder() as folder:
        target = Target(url=str(folder / "registry"), cache=folder / "cache")
        outcome = apart(
            folder / "job", skewed_gcs, timeout=500, target=target, publishers=2, collectors=2, gcs=gcs, seed=0
        )
    against = (
        f"{outcome.published} versions were published meanwhile, {outcome.conflicts} publishers began anew, "
        f"{outcome.taken} of their folders were taken"
    )
    _report("gcs with clocks 25 h ahead", outcome.gcs, outcome.violations, against)


def _report(name: str, tries: int, violations: list[str], against: str) -> None:
    for line in violations[:10]:
        print(line)
    report(f"{name}: tries", tries, against=against)
    report(f"{name}: violations", len(violations), target="0", holds=not violations, against=against)


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


if __name__ == "__main__":
    hostile_registries()
    skewed_clocks()
