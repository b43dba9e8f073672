"""Checkpoints that are damaged, and those of strangers, read by everything that reads them; and what digests cost."""

import logging
import random
import resource
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from benchmarks.figure import report
from tests.support import damages, hostile, nights
from torchrec_cce.sharding.hashing_writer import HashingWriter

_TRIES = 2000
_OLDER_TRIES = 1000
_GIB = 1 << 30
_ROUNDS = 9


def damaged_checkpoint_figures() -> None:
    """About five minutes on two cores."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        run = nights.train_a_run(Path(scratch))
        older = damages.without_digests(run, Path(scratch) / "older")
        readers = f"{len(damages.READERS)} readers: {', '.join(damages.READERS)}"
        damages.attack(run, tries=50, seed=0, readers=damages.READERS)
        before = _memory_bytes()
        found = damages.attack(run, tries=_TRIES, seed=1, readers=damages.READERS)
        report(
            "damaged checkpoint files: violations (something else read, a traceback)",
            len(found),
            target="0",
            holds=not found,
            against=f"{_TRIES} tries, {readers}",
        )
        grown = (_memory_bytes() - before) / 2**20
        report("damaged checkpoint files: growth of memory, MiB", grown, against=f"the most held in {_TRIES} tries")
        found += damages.attack(older, tries=_OLDER_TRIES, seed=2, readers=damages.READERS, may_differ=True)
        report(
            "damaged checkpoint files without digests: violations (a traceback)",
            len(found),
            target="0",
            holds=not found,
            against=f"{_OLDER_TRIES} tries, {readers}",
        )
        for line in found:
            print(line)
        hostile_run_figures(run)
    digest_cost_figures()


def hostile_run_figures(run: Path) -> None:
    """Every way to hide code in a checkpoint, before every reader."""
    tries = executed = 0
    for attack in hostile.ATTACKS:
        with tempfile.TemporaryDirectory() as scratch:
            copy, marker = Path(scratch) / "run", Path(scratch) / "marker"
            shutil.copytree(run, copy)
            attack(nights.newest(copy), marker)
            hostile.forge_digests(nights.newest(copy))
            for reader in damages.READERS.values():
                found, error = damages.outcome(reader, copy)
                executed += marker.exists() or found is not None or error is not None
                tries += 1
    report(
        "checkpoints that hold code: violations (it ran, was read, or a traceback)",
        executed,
        target="0",
        holds=executed == 0,
        against=f"{tries} tries",
    )


def digest_cost_figures() -> None:
    """One GiB of weights written to the disk with and without digests, one after the other, in either order."""
    state = {f"t{number}": torch.empty(_GIB // 16).uniform_() for number in range(4)}
    seconds: dict[type[FileSystemWriter], list[float]] = {FileSystemWriter: [], HashingWriter: []}
    for number in range(_ROUNDS + 1):
        for kind in sorted(seconds, key=lambda _: random.random()):
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                save(state, storage_writer=kind(Path(folder) / "saved"), no_dist=True)
                if number > 0:
                    seconds[kind].append(time.perf_counter() - started)
    plain, hashed = (statistics.median(each) for each in seconds.values())
    report(
        "digests of a checkpoint of 1 GiB: share of the time of saving it",
        hashed / plain - 1,
        target="≤ 0.05",
        holds=hashed / plain <= 1.05,
        against=f"PyTorch's writer, {plain:.2f} s in the median of {_ROUNDS}, fsync included",
    )


def _memory_bytes() -> int:
    """The most that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    damaged_checkpoint_figures()
