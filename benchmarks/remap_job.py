"""Remapping stored data, against reading and writing the same file with pyarrow, one thread and process each.

`python -m benchmarks.remap_job` makes 5 million rows of 26 Zipf columns and their maps in a temporary folder (about
6 GB while it runs). Every measurement is a process of its own; those that are compared take turns.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.figure import race, report
from benchmarks.processes import memory_bytes
from torchrec_cce.jobs.remap.file import open_version
from torchrec_cce.jobs.remap.input import InputFile
from torchrec_cce.jobs.remap.job import remap, remapped_format
from torchrec_cce.jobs.remap.parquet.chunks import Chunk
from torchrec_cce.jobs.remap.parquet.file import remap_parquet
from torchrec_cce.jobs.remap.parquet.metadata import FileMetaData, RowGroup
from torchrec_cce.jobs.remap.parquet.thrift import LIST, STRUCT, Items, read_struct, write_struct
from torchrec_cce.jobs.remap.remapper import FeatureMap, Remapper, Words
from torchrec_cce.maps.pointer_map import PointerMap, Resolved
from torchrec_cce.maps.registry import Registry
from torchrec_cce.maps.snapshot import TableSnapshot

ROWS, GROUP = 5_000_000, 1 << 20
SIZES = [1_000_000] * 20 + [10_000_000] * 6
"""Raw IDs of each column."""
K, C = 4096, 4
"""Pointers are 4 uint16."""
ROUNDS = 5


def remap_job_figures() -> None:
    """Print all figures; takes about five minutes on two cores."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["TORCHREC_CCE_CACHE"] = str(folder / "cache")
        _make_maps(folder / "registry")
        (folder / "one").mkdir()
        _make_log(folder / "one" / "log.parquet")
        _compare(folder)
        _read_back(folder)
        _memory(folder)
        _workers(folder)


def _compare(folder: Path) -> None:
    raw = folder / "one" / "log.parquet"
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(ROUNDS):
        for compression in ("zstd", "lz4"):
            for way in ("plain", "remap"):
                target = folder / f"{way}.{compression}"
                runs.setdefault((way, compression), []).append(_apart(folder, way, raw, target, compression))
    for compression, least in (("zstd", 1.9), ("lz4", 2.3)):
        plain, ours = runs["plain", compression], runs["remap", compression]
        against = (
            f"pyarrow read and write, {compression}, 1 thread, {ROWS:,} rows × {len(SIZES)} int64, row groups of 1 Mi"
        )
        for clock in ("cpu", "wall"):
            ratio = statistics.median(a[clock] for a in plain) / statistics.median(b[clock] for b in ours)
            wanted = clock == "cpu"
            report(
                f"remap to words, {compression}, times the speed ({clock} time)",
                ratio,
                target=f"≥ {least}" if wanted else None,
                holds=ratio >= least if wanted else None,
                against=against,
            )
        rate = ROWS / statistics.median(b["cpu"] for b in ours)
        report(f"remap to words, {compression}, rows a CPU second", rate, against=against)
        size = (folder / f"remap.{compression}").stat().st_size / raw.stat().st_size
        report(f"size of the remapped file, {compression}, over the raw file (zstd)", size, against=against)
    ours = runs["remap", "zstd"]
    share = statistics.median(run["find"] / run["cpu"] for run in ours)
    of_plain = statistics.median(run["find"] for run in ours) / statistics.median(
        run["cpu"] for run in runs["plain", "zstd"]
    )
    report("share of lookups in the time of the remap, zstd", share, target="≤ 0.1", holds=share <= 0.1, against="CPU")
    report("lookups over the time of pyarrow read and write, zstd", of_plain, against="CPU time")


def _read_back(folder: Path) -> None:
    seconds = _apart(folder, "read", folder / "one/log.parquet", folder / "remap.zstd", "none")
    ratio = seconds["source"] / seconds["target"]
    report(
        "reading all columns of the remapped file, times the speed",
        ratio,
        target="≥ 1",
        holds=ratio >= 1,
        against="pyarrow read of the raw file, zstd both, taking turns, median CPU time, 1 thread",
    )


def _memory(folder: Path) -> None:
    raw, large = folder / "one" / "log.parquet", folder / "large.parquet"
    _repeat(raw, large, 10)
    small = _apart(folder, "remap", raw, folder / "remap.small", "zstd")["rss"]
    big = _apart(folder, "remap", large, folder / "remap.large", "zstd")["rss"]
    maps = sum(SIZES) * 2 * C
    against = f"{maps / 2**30:.2f} GiB of it are mapped pointers"
    report(f"peak resident GiB, {ROWS:,} rows", small / 2**30, target="< 2", holds=small < 2 << 30, against=against)
    report(f"peak resident GiB, {10 * ROWS:,} rows", big / 2**30, target="< 2", holds=big < 2 << 30, against=against)
    report(
        "growth of peak memory",
        big / small,
        target="≤ 1.1",
        holds=big / small <= 1.1,
        against="a file of 10 × the rows",
    )
    for name in ("remap.large", "remap.small", "large.parquet"):
        (folder / name).unlink()


def _workers(folder: Path) -> None:
    """Whole jobs with their workers' start: one file, and four."""
    raw = folder / "one" / "log.parquet"
    (folder / "four").mkdir()
    for number in range(4):
        os.link(raw, folder / "four" / f"{number}.parquet")
    for name, files in (("one", "1 file"), ("four", "4 files")):
        seconds: dict[int, list[float]] = {1: [], 2: []}
        again: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(ROUNDS):
            for workers in (1, 2):
                found = _apart(folder, "job", folder / name, workers)
                seconds[workers].append(found["first"])
                again[workers].append(found["second"])
        ratio = min(seconds[1]) / min(seconds[2])
        against = f"1 worker, {files} of {ROWS:,} rows, whole job with the start of its workers, best of {ROUNDS}"
        report(f"2 workers, {files}, times the speed", ratio, target="≥ 1.7", holds=ratio >= 1.7, against=against)
        report(f"1 worker, {files}, seconds of the job", min(seconds[1]), against=against)
        against = "the same, second job of a process: what is loaded is not loaded again"
        report(f"2 workers, {files}, second job, times the speed", min(again[1]) / min(again[2]), against=against)
        report(f"1 worker, {files}, second job, seconds", min(again[1]), against=against)


def _make_maps(registry: Path) -> None:
    rng = np.random.default_rng(0)
    tables = {}
    for number, num_ids in enumerate(SIZES):
        start = PointerMap.hashed(num_ids=num_ids, num_columns=C, num_rows=K, seed=number)
        pointers = rng.integers(0, K, (num_ids, C), dtype=np.uint16)
        tables[f"t{number}"] = TableSnapshot(
            pointer_map=start.clustered(pointers, start.next_helper_hash(0)),
            num_embeddings=num_ids,
            embedding_dim=16,
            feature_names=(f"c{number}",),
            pooling="sum",
            weights=np.zeros((2 * C * K, 4), np.float32),
        )
    Registry(registry).publish(tables)


def _make_log(path: Path) -> None:
    rng = np.random.default_rng(1)
    writer = None
    for start in range(0, ROWS, GROUP):
        count = min(GROUP, ROWS - start)
        table = pa.table({f"c{number}": _zipf(rng, num_ids, count) for number, num_ids in enumerate(SIZES)})
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table, row_group_size=GROUP)
    assert writer is not None
    writer.close()


def _zipf(rng: np.random.Generator, num_ids: int, count: int, exponent: float = 1.1) -> npt.NDArray[np.int64]:
    """IDs of which the r-th most frequent has a share of about r^-1.1, spread over their range."""
    power = 1 - exponent
    ranks = ((num_ids**power - 1) * rng.random(count) + 1) ** (1 / power)
    ids: npt.NDArray[np.int64] = np.minimum(ranks.astype(np.int64) - 1, num_ids - 1) * 0x9E3779B1 % num_ids
    return ids


def _repeat(source: Path, target: Path, times: int) -> None:
    """A file with the row groups of another, many times: its bytes again, and a footer that points at them."""
    data = source.read_bytes()
    length = int.from_bytes(data[-8:-4], "little")
    body = data[4 : -8 - length]
    footer, _ = read_struct(FileMetaData, data, len(data) - 8 - length)
    groups = []
    with target.open("wb") as file:
        file.write(b"PAR1")
        for turn in range(times):
            file.write(body)
            groups += [_moved(group, turn * len(body)) for group in footer.row_groups]
        footer.num_rows *= times
        footer.row_groups = groups
        new = write_struct(footer)
        file.write(new + len(new).to_bytes(4, "little") + b"PAR1")


def _moved(group: RowGroup, by: int) -> RowGroup:
    group = RowGroup(group)
    group[RowGroup.COLUMNS] = (
        LIST,
        Items(STRUCT, [Chunk.of([], entry.meta_data).entry_at(by) for entry in group.columns]),
    )
    return group


def _apart(folder: Path, *arguments: object) -> dict[str, float]:
    """One measurement in a fresh process with one thread for everything."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", __spec__.name, str(folder / "registry"), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _measure(registry: str, way: str, source: str, target: str, compression: str = "") -> dict[str, float]:
    if way == "job":
        return {number: _job(registry, source, int(target)) for number in ("first", "second")}
    if way == "read":
        return race({"source": lambda: _read(source), "target": lambda: _read(target)})
    found = {"find": 0.0}
    work = _plain if way == "plain" else _remapping(registry, source, found)
    cpu, wall = time.process_time(), time.perf_counter()
    work(source, target, compression)
    found |= {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    return found | {"rss": memory_bytes("VmHWM")}  # `getrusage` would count the process that started this one


def _job(registry: str, source: str, num_workers: int) -> float:
    """Seconds of a job. Into memory, where there is such a folder: the speed of the disk is
    not asked for, and every file is flushed to it.
    """
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else Path(source).parent) as out:
        return remap(source, out, registry=registry, num_workers=num_workers).seconds


def _remapping(registry: str, source: str, found: dict[str, float]) -> Callable[[str, str, str], None]:
    """The work of a task of a job, once its map is open; it counts the CPU seconds of lookups."""

    path = Path(source)
    opened = open_version(registry, None, {})
    file = InputFile(name=path.name, num_bytes=0, stamp="")
    remapped = remapped_format(opened, str(path.parent), file, None, "words", "drop", {})
    remapper = Remapper(format=remapped, maps={name: table.pointer_map for name, table in opened.tables.items()})
    find = FeatureMap.find

    def timed(self: FeatureMap, ids: npt.NDArray[np.int64]) -> tuple[Words, Resolved]:
        began = time.process_time()
        try:
            return find(self, ids)
        finally:
            found["find"] += time.process_time() - began

    FeatureMap.find = timed  # type: ignore[method-assign]
    for feature in remapper.format.features:
        remapper.features_of(feature)[0].find(np.zeros(1, np.int64))  # loads the kernels

    def work(source: str, target: str, compression: str) -> None:
        codec = {"lz4": "lz4_raw"}.get(compression, compression)
        with pa.OSFile(source) as file, open(target, "wb") as out:
            remap_parquet(file, source, remapper, out.write, compression=codec, num_threads=1)

    return work


def _plain(source: str, target: str, compression: str) -> None:
    with pq.ParquetFile(source) as file, pq.ParquetWriter(target, file.schema_arrow, compression=compression) as writer:
        for group in range(file.num_row_groups):
            writer.write_table(file.read_row_group(group, use_threads=False), row_group_size=GROUP)


def _read(source: str) -> None:
    with pq.ParquetFile(source) as file:
        for group in range(file.num_row_groups):
            file.read_row_group(group, use_threads=False)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        remap_job_figures()
    else:
        print(json.dumps(_measure(*sys.argv[1:])))
