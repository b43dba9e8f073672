"""Speed of the remap: raw IDs to the rows of codebook and helper. One thread, CPU time, interleaved, medians."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np

from benchmarks.figure import race, report
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.methods.cce import CCEScheme

NUM_IDS, BATCH = 10_000_000, 1_000_000


def remap_speed(num_columns: int, num_rows: int, dtype: type[np.unsignedinteger]) -> None:
    rng = np.random.default_rng(0)
    start = PointerMap.hashed(num_ids=NUM_IDS, num_columns=num_columns, num_rows=num_rows, seed=1)
    pointers = rng.integers(0, num_rows, (NUM_IDS, num_columns), dtype=dtype)
    pointer_map = start.clustered(pointers, start.next_helper_hash(1))
    scheme, helper = CCEScheme(pointer_map=pointer_map), pointer_map.helper_hash
    ids = rng.integers(0, NUM_IDS, BATCH)
    out = np.empty((num_columns, BATCH, 2), np.int64)
    seconds = race(
        {
            "ours": lambda: scheme.rows_into(ids, out),
            "numpy": lambda: (pointers[ids], helper.numpy(ids)),
        }
    )
    ratio = seconds["numpy"] / seconds["ours"]
    what = f"{num_columns} columns of {np.dtype(dtype).name}"
    report(
        f"remap, {what}, times as fast",
        ratio,
        target="≥ 3",
        holds=ratio >= 3,
        against=f"numpy pointers[ids], then the helper hash in numpy; {BATCH:,} IDs, map of {NUM_IDS:,}, one thread",
    )
    report(
        f"remap, {what}, ns per ID",
        seconds["ours"] / BATCH * 1e9,
        against=f"numpy takes {seconds['numpy'] / BATCH * 1e9:.1f}",
    )


def remap_figures() -> None:
    remap_speed(4, 4096, np.uint16)
    remap_speed(8, 250, np.uint8)


if __name__ == "__main__":
    remap_figures()
