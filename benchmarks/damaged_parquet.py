"""Parquet files damaged in thousands of ways: what a remap makes of them. `python -m benchmarks.damaged_parquet`."""

import time
import traceback

from benchmarks.figure import report
from benchmarks.processes import Peak, fresh
from tests.support.damaged_parquet import damages, remappers, violation

TRIES, SEED = 2000, 20
AT_A_TIME = 250
"""In one process: a crash of it counts as one violation, and ends no more tries than these."""
MOST_SECONDS, MOST_BYTES = 5.0, 256 << 20
"""CPU time of a try, and growth of a process, above which they are violations: the files have a few KB."""


def damaged_parquet_figures() -> None:
    """Print both figures; takes about two minutes."""
    found, tries, grown = [], 0, 0
    for number in range(TRIES // AT_A_TIME):
        try:
            wrong, done, growth = fresh(attack, SEED + number)
        except Exception as error:  # noqa: BLE001  whatever ended the process
            wrong, done, growth = [f"a process ended in seed {SEED + number}: {error!r}"], AT_A_TIME, 0
        found += wrong
        tries, grown = tries + done, max(grown, growth)
    for line in found:
        print(line)
    against = (
        f"{tries:,} tries; the remap of what pyarrow reads, or an error of one line; no traceback, no crash, at most "
        f"{MOST_SECONDS:.0f} CPU s and {MOST_BYTES >> 20} MiB"
    )
    report("damaged Parquet files: tries", tries, target=f"≥ {TRIES}", holds=tries >= TRIES, against=against)
    report("damaged Parquet files: violations", len(found), target="0", holds=not found, against=against)
    report("damaged Parquet files: most MiB that a process grew", grown / 2**20, against=f"{AT_A_TIME} tries each")


def attack(seed: int) -> tuple[list[str], int, int]:
    """The violations among the damages of a seed, the number of tries, and by how many bytes the process grew."""
    found, tries, ways = [], 0, remappers()
    with Peak("VmRSS") as memory:
        for name, data, whole in damages(seed, AT_A_TIME):
            began = time.process_time()
            try:
                wrong = violation(data, whole, ways[tries % len(ways)])
            except Exception:  # noqa: BLE001  a traceback, which is what is looked for
                wrong = traceback.format_exc()
            if wrong is None and time.process_time() - began > MOST_SECONDS:
                wrong = f"takes {time.process_time() - began:.1f} CPU s"
            tries += 1
            if wrong is not None:
                found.append(f"{name}: {wrong}")
    if memory.grown > MOST_BYTES:
        found.append(f"seed {seed}: the process grew by {memory.grown >> 20} MiB")
    return found, tries, memory.grown


if __name__ == "__main__":
    damaged_parquet_figures()
