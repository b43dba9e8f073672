"""Vocabularies: lookup of 64-bit keys, one thread, CPU time, interleaved, medians; and building one from a log."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import fbgemm_gpu  # noqa: F401  (registers the operators)
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.figure import race, report
from torchrec_cce.maps.vocabulary import Vocabulary

NUM_KEYS, BATCH = 10_000_000, 1_000_000
UNSEEN = 0.02
LOG_ROWS, LOG_MEMORY_BYTES = 20_000_000, 64 << 20


def vocabulary_figures() -> None:
    """Print all figures; about a minute and 2 GB."""
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 2**63 - 1, NUM_KEYS)  # all different, as it happens, and not negative, as FBGEMM wants them
    build_figures(keys)
    lookup_figures(keys, rng)
    log_figures(rng)


def build_figures(keys: npt.NDArray[np.int64]) -> None:
    vocabulary = Vocabulary.build(keys, num_threads=1)
    bytes_a_key = vocabulary.nbytes / len(keys)
    what = f"{len(keys):,} keys"
    report("vocabulary, bytes a key", bytes_a_key, target="≤ 27", holds=bytes_a_key <= 27, against=what)
    for num_threads in (1, 2):
        seconds = min(_seconds_to_build(keys, num_threads) for _ in range(5))
        report(
            f"vocabulary, seconds to build, {num_threads} threads", seconds, against=f"{what}; best of 5 by the clock"
        )


def lookup_figures(keys: npt.NDArray[np.int64], rng: np.random.Generator) -> None:
    torch.set_num_threads(1)
    vocabulary = Vocabulary.build(keys)
    queries = keys[rng.integers(0, len(keys), BATCH)]
    unseen = rng.random(BATCH) < UNSEEN
    queries[unseen] = rng.integers(0, 2**63 - 1, int(unseen.sum()))
    out = np.empty(BATCH, np.int64)

    index = pd.Index(keys)
    capacity = 2 * len(keys)
    table = torch.full((capacity, 2), -1, dtype=torch.int64)
    rows, num_keys, size = torch.arange(len(keys)), torch.tensor([0, len(keys)]), torch.tensor([0, capacity])
    torch.ops.fbgemm.pruned_hashmap_insert(torch.from_numpy(keys), rows, num_keys, table, size)
    asked, num_asked = torch.from_numpy(queries), torch.tensor([0, BATCH])
    candidates: dict[str, Callable[[], object]] = {
        "ours": lambda: vocabulary.positions(queries, out),
        "FBGEMM": lambda: torch.ops.fbgemm.pruned_hashmap_lookup(asked, num_asked, table, size),
        "pandas": lambda: index.get_indexer(queries),
    }
    expected = vocabulary.positions(queries)
    for name, candidate in candidates.items():
        assert np.array_equal(np.asarray(candidate()).reshape(-1), expected), name
    seconds = race(candidates)
    against = f"{BATCH:,} shuffled keys, {UNSEEN:.0%} unseen, of {len(keys):,}, one thread"
    for name, what, target in (
        ("FBGEMM", "torch.ops.fbgemm.pruned_hashmap_lookup, load 0.5", 4),
        ("pandas", "pandas.Index.get_indexer", 7),
    ):
        ratio = seconds[name] / seconds["ours"]
        report(
            f"vocabulary, lookup, times as fast as {name}",
            ratio,
            target=f"≥ {target}",
            holds=ratio >= target,
            against=f"{what}; {against}",
        )
    report("vocabulary, lookup, ns a key", seconds["ours"] / BATCH * 1e9, against=against)


def log_figures(rng: np.random.Generator) -> None:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.parquet"
        with pq.ParquetWriter(log, pa.schema([("id", pa.int64())])) as writer:
            for _ in range(0, LOG_ROWS, 1 << 20):
                # Three quarters of a power law, and a long tail of IDs that occur once.
                ids = rng.zipf(1.2, 1 << 20).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
                ids[::4] = rng.integers(0, 2**63 - 1, len(ids[::4]))
                writer.write_table(pa.table({"id": ids.view(np.int64)}))
        small = Path(folder) / "small.parquet"
        pq.write_table(pa.table({"id": np.arange(1000) // 2}), small)
        program = [sys.executable, "-W", "ignore", "-c", _BUILD_FROM_LOG, str(small), str(log), str(LOG_MEMORY_BYTES)]
        done = subprocess.run(program, capture_output=True, text=True, check=True)
    rows, distinct, kept, seconds, spilled, peak = map(float, done.stdout.split())
    against = (
        f"{rows:,.0f} rows, {distinct:,.0f} distinct IDs, {kept:,.0f} kept that occur twice; memory for counting "
        f"{LOG_MEMORY_BYTES >> 20} MiB, {spilled / 1e6:.0f} MB spilled; one thread"
    )
    report("vocabulary from Parquet, million rows a second", rows / seconds / 1e6, against=against)
    report("vocabulary from Parquet, peak memory above the start in MiB", peak / 2**20, against=against)


# In a process of its own, whose memory nothing else has raised.
_BUILD_FROM_LOG = """
import sys, threading
from torchrec_cce.data.vocabulary import build_vocabulary

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, resident())

def build(log):
    options = {"min_frequency": 2, "memory_bytes": int(sys.argv[3]), "num_threads": 1}
    return build_vocabulary(log, columns=["id"], **options).report

build(sys.argv[1])  # compiles
before = peak = resident()
done = threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
report = build(sys.argv[2])
done.set()
watcher.join()
print(report.rows, report.distinct, report.kept, report.seconds, report.spilled_bytes, peak - before)
"""


def _seconds_to_build(keys: npt.NDArray[np.int64], num_threads: int) -> float:
    started = time.perf_counter()
    Vocabulary.build(keys, num_threads=num_threads)
    return time.perf_counter() - started


if __name__ == "__main__":
    vocabulary_figures()
