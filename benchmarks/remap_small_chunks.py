"""Remapping files of many small column chunks: what a chunk costs. `python -m benchmarks.remap_small_chunks`."""

import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.figure import report
from torchrec_cce.jobs.remap.job import remap
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.registry import Registry
from torchrec_cce.maps.snapshot import TableSnapshot

GROUPS, COLUMNS = 40_000, 2_000


def small_chunks_figures() -> None:
    """Print the figures; takes about a minute."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = PointerMap.hashed(num_ids=1000, num_columns=4, num_rows=50, seed=0)
        pointers = np.random.default_rng(0).integers(0, 50, (1000, 4), dtype=np.uint8)
        snapshot = TableSnapshot(
            pointer_map=start.clustered(pointers, start.next_helper_hash(0)),
            num_embeddings=1000,
            embedding_dim=16,
            feature_names=("user",),
            pooling="sum",
            weights=np.zeros((2 * 4 * 50, 4), np.float32),
        )
        Registry(folder / "registry").publish({"t": snapshot})
        rows = pa.table({"user": [1, 2], "x": [1, 2]})
        _time(folder, "few", rows, 1)  # loads the kernels
        seconds = _time(folder, "groups", rows, GROUPS)
        against = f"{GROUPS:,} row groups of 2 rows, an ID column and another, 1 worker"
        report("remap of many row groups, seconds", seconds, target="≤ 10", holds=seconds <= 10, against=against)
        wide = pa.table({"user": [1, 2], **{f"x{number}": [1.5, 2.5] for number in range(COLUMNS)}})
        seconds = _time(folder, "columns", wide, 1)
        report("remap of many columns, seconds", seconds, against=f"{COLUMNS:,} columns that are copied, 1 worker")


def _time(folder: Path, name: str, rows: pa.Table, groups: int) -> float:
    path = folder / f"{name}.parquet"
    with pq.ParquetWriter(path, rows.schema) as writer:
        for _ in range(groups):
            writer.write_table(rows)
    began = time.perf_counter()
    remap(str(path), str(folder / name), registry=str(folder / "registry"), num_workers=1)
    return time.perf_counter() - began


if __name__ == "__main__":
    small_chunks_figures()
