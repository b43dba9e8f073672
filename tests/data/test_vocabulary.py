"""Vocabularies of logs: every kind of file and column, the order of rows, the report, and the memory."""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_cce.data.vocabulary import BuiltVocabulary, VocabularyReport, build_vocabulary
from torchrec_cce.errors import ConfigError, DataFileError

EXTREMES = [-(2**63), -1, 0, 1, 2**63 - 1]


def ranked(keys: list[int]) -> list[tuple[int, int]]:
    """(key, frequency) in the order of the rows, by a plain Counter."""
    return sorted(Counter(keys).items(), key=lambda item: (-item[1], item[0]))


def found(built: BuiltVocabulary) -> list[tuple[int, int]]:
    return list(zip(built.vocabulary.keys().tolist(), built.frequencies.tolist(), strict=True))


def facts(report: VocabularyReport) -> dict[str, int]:
    return {name: value for name, value in vars(report).items() if name not in ("seconds", "spilled_bytes")}


def parquet(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path, row_group_size=3)


def arrow_file(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def arrow_stream(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def feather(path: Path, table: pa.Table) -> None:
    pyarrow.feather.write_feather(table, str(path), compression="zstd")


WRITERS = [
    ("log.parquet", parquet),
    ("log.arrow", arrow_file),
    ("log.arrow", arrow_stream),
    ("log.arrows", arrow_stream),
    ("log.feather", feather),
]

KINDS = [
    *((pa.array([3, None, 0, 7, 3], getattr(pa, name)()), [3, 0, 7, 3], 1) for name in
      ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")),
    (pa.array([2**64 - 1, None, 2**63, 2**53 + 1, None], pa.uint64()), [-1, -(2**63), 2**53 + 1], 2),
    (pa.array([2**63 - 1, 0, -(2**63), -1, -1], pa.int64()), [2**63 - 1, 0, -(2**63), -1, -1], 0),
    (pa.array([9, None, 9, 5, 6], pa.int64()).dictionary_encode(), [9, 9, 5, 6], 1),
    (pa.array([[1, 2], None, [], [3], [1, 1]], pa.list_(pa.int32())), [1, 2, 3, 1, 1], 1),
    (pa.array([[1, 2**64 - 1], None, [], [3], []], pa.large_list(pa.uint64())), [1, -1, 3], 1),
    (pa.array([[1, 2], None, [5, 6], [3, 4], [1, 1]], pa.list_(pa.int64(), 2)), [1, 2, 5, 6, 3, 4, 1, 1], 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "writer"), WRITERS)
@pytest.mark.parametrize(("array", "ids", "nulls"), KINDS, ids=lambda value: str(getattr(value, "type", "")))
def test_every_kind_of_column_in_every_kind_of_file(
    tmp_path: Path, name: str, writer: Callable[[Path, pa.Table], None], array: pa.Array, ids: list[int], nulls: int
) -> None:
    text = pa.array(["not", "to", "be", "read", "here"])
    writer(tmp_path / name, pa.table({"text": text, "c": array, "d": pa.array([7] * 5)}))
    built = build_vocabulary(tmp_path / name, columns=["c"], num_threads=1)
    assert found(built) == ranked(ids)
    assert (built.report.rows, built.report.occurrences, built.report.nulls) == (5, len(ids), nulls)
    both = build_vocabulary(tmp_path / name, columns=["d", "c"], num_threads=2)
    assert found(both) == ranked(ids + [7] * 5)


some_keys = st.lists(st.sampled_from(EXTREMES) | st.integers(-3, 12), max_size=60)


@given(
    keys=some_keys,
    cut=st.integers(0, 60),
    min_frequency=st.integers(1, 4),
    max_size=st.none() | st.integers(1, 15),
    num_threads=st.integers(1, 3),
)
def test_rows_and_report_equal_a_counter(
    tmp_path_factory: pytest.TempPathFactory,
    keys: list[int],
    cut: int,
    min_frequency: int,
    max_size: int | None,
    num_threads: int,
) -> None:
    folder = tmp_path_factory.getbasetemp()
    paths = [folder / "one.parquet", folder / "two.arrow"]
    parquet(paths[0], pa.table({"c": pa.array(keys[:cut], pa.int64())}))
    arrow_file(paths[1], pa.table({"c": pa.array(keys[cut:], pa.int64())}))
    built = build_vocabulary(
        paths, columns=["c"], min_frequency=min_frequency, max_size=max_size, num_threads=num_threads
    )
    everything = ranked(keys)
    frequent = [item for item in everything if item[1] >= min_frequency]
    kept, rare, surplus = frequent[:max_size], everything[len(frequent) :], frequent[len(frequent[:max_size]) :]
    assert found(built) == kept
    sums = [sum(frequency for _, frequency in part) for part in (kept, rare, surplus)]
    assert facts(built.report) == {
        "rows": len(keys),
        "occurrences": len(keys),
        "nulls": 0,
        "distinct": len(everything),
        "kept": len(kept),
        "kept_occurrences": sums[0],
        "rare": len(rare),
        "rare_occurrences": sums[1],
        "surplus": len(surplus),
        "surplus_occurrences": sums[2],
    }
    assert built.report.coverage == (sums[0] / len(keys) if keys else 1)


def skewed_log(folder: Path, size: int = 400_000, num_files: int = 3) -> tuple[list[Path], np.ndarray]:
    rng = np.random.default_rng(0)
    keys = (rng.zipf(1.2, size).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)
    keys[::3] = rng.integers(-(2**63), 2**63 - 1, len(keys[::3]))
    paths = []
    for number, part in enumerate(np.array_split(keys, num_files)):
        paths.append(folder / f"part-{number}.parquet")
        pq.write_table(pa.table({"c": part}), paths[-1], row_group_size=50_000)
    return paths, keys


@pytest.mark.parametrize(("min_frequency", "max_size"), [(1, None), (2, None), (1, 1000), (1, 50_000)])
def test_neither_threads_nor_order_nor_memory_changes_a_vocabulary(
    tmp_path: Path, min_frequency: int, max_size: int | None
) -> None:
    paths, keys = skewed_log(tmp_path)
    options: dict[str, Any] = {"columns": ["c"], "min_frequency": min_frequency, "max_size": max_size}
    one = build_vocabulary(tmp_path, **options, num_threads=1)
    assert one.report.spilled_bytes == 0
    assert found(one) == [item for item in ranked(keys.tolist()) if item[1] >= min_frequency][:max_size]
    for num_threads in (1, 3):
        other = build_vocabulary(paths[::-1], **options, num_threads=num_threads, memory_bytes=1 << 20)
        assert other.report.spilled_bytes > 1_000_000
        assert other.vocabulary.digest == one.vocabulary.digest
        np.testing.assert_array_equal(other.frequencies, one.frequencies)
        assert facts(other.report) == facts(one.report)


def test_progress_and_empty_logs(tmp_path: Path) -> None:
    skewed_log(tmp_path)
    seen: list[int] = []
    build_vocabulary(tmp_path, columns=["c"], num_threads=2, on_progress=seen.append)
    assert seen == sorted(set(seen))
    assert seen[-1] == 400_000
    empty = tmp_path / "empty.arrow"
    arrow_file(empty, pa.table({"c": pa.array([], pa.int64())}))
    built = build_vocabulary(empty, columns=["c"])
    assert (built.vocabulary.num_ids, len(built.frequencies), built.report.coverage) == (0, 0, 1)


@pytest.mark.parametrize(("name", "writer"), WRITERS)
def test_bad_cells_and_columns_are_named(tmp_path: Path, name: str, writer: Callable[[Path, pa.Table], None]) -> None:
    path = tmp_path / name
    lists = pa.array([[1]] * 7 + [[2, None]] + [[]] * 2, pa.list_(pa.int64()))
    writer(path, pa.table({"c": lists, "s": pa.array(["x"] * 10), "x": pa.array([0.5] * 10)}))
    # Row groups and record batches have three rows, but a Feather file has one batch.
    place = "row 7 "
    if path.suffix == ".feather":
        place = "row 7 of record batch 0 "
    elif writer is arrow_file:
        place = "row 1 of record batch 2 "
    for columns, message in (
        (["c"], rf"column 'c', {re.escape(place)}\(the first is 0\) holds a list with a null"),
        (["s"], "column 's' is string, not integer"),
        (["x"], "column 'x' is double; IDs are integers"),
        (["c", "y"], r"there is no column 'y'; the columns are \['c', 's', 'x'\]"),
    ):
        with pytest.raises(DataFileError, match=f"^{re.escape(str(path))}: {message}"):
            build_vocabulary(path, columns=columns, num_threads=2)


def test_rows_are_counted_over_the_batches_of_a_row_group(tmp_path: Path) -> None:
    lists = pa.array([[1]] * 70_000 + [[None]] + [[2]] * 70_000, pa.list_(pa.int64()))
    pq.write_table(pa.table({"c": lists}), tmp_path / "log.parquet", row_group_size=60_000)
    pq.write_table(pa.table({"c": lists}), tmp_path / "one.parquet")
    for name in ("log.parquet", "one.parquet"):
        with pytest.raises(DataFileError, match=rf"{name}: column 'c', row 70000 \(the first is 0\)"):
            build_vocabulary(tmp_path / name, columns=["c"], num_threads=1)


@pytest.mark.parametrize(("name", "writer"), WRITERS)
def test_damaged_files_are_named(tmp_path: Path, name: str, writer: Callable[[Path, pa.Table], None]) -> None:
    path = tmp_path / name
    writer(path, pa.table({"c": np.arange(10_000)}).slice(0, 2000))
    good = path.read_bytes()
    kind = "Parquet" if path.suffix == ".parquet" else "Arrow IPC"
    for damaged in (b"", b"no such format", good[: len(good) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(DataFileError, match=f"^{re.escape(str(path))}: cannot be read as {kind}"):
            build_vocabulary(path, columns=["c"])
    with pytest.raises(DataFileError, match="no such file or folder"):
        build_vocabulary(tmp_path / "absent.arrow", columns=["c"])


def test_a_bad_last_file_is_found_before_the_first_is_read(tmp_path: Path) -> None:
    skewed_log(tmp_path)
    parquet(tmp_path / "z.parquet", pa.table({"d": [1]}))
    seen: list[int] = []
    with pytest.raises(DataFileError, match=r"z\.parquet: there is no column 'c'"):
        build_vocabulary(tmp_path, columns=["c"], on_progress=seen.append)
    assert seen == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": []}, r"columns=\[\]"),
        ({"columns": "c"}, "columns='c'"),
        ({"columns": ["c", "c"]}, r"columns=\['c', 'c'\]"),
        ({"min_frequency": 0}, "min_frequency=0 must be at least 1"),
        ({"max_size": 0}, "max_size=0 must be at least 1"),
        ({"memory_bytes": 1000}, "memory_bytes=1000 must be at least 1048576"),
        ({"num_threads": 0}, "num_threads=0 must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    parquet(tmp_path / "log.parquet", pa.table({"c": [1]}))
    with pytest.raises(ConfigError, match=message):
        build_vocabulary(tmp_path, **{"columns": ["c"], **options})


PEAK = """
import sys, threading, time
from torchrec_cce.data.vocabulary import build_vocabulary

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, resident())

warm, log, memory_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
build_vocabulary(warm, columns=["c"], memory_bytes=1 << 20, num_threads=2)
before = peak = resident()
done = threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
report = build_vocabulary(log, columns=["c"], min_frequency=2, memory_bytes=memory_bytes, num_threads=2).report
done.set()
watcher.join()
print(peak - before, report.distinct, report.kept)
"""


def test_memory_is_bounded(tmp_path: Path) -> None:
    size = 5_000_000
    keys = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, size)
    pq.write_table(pa.table({"c": keys}), tmp_path / "log.parquet", row_group_size=1 << 18, compression="none")
    warm, _ = skewed_log(tmp_path, 100_000, 1)

    def peak(memory_bytes: int) -> int:
        arguments = [str(warm[0]), str(tmp_path / "log.parquet"), str(memory_bytes)]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PEAK, *arguments], capture_output=True, text=True, check=True
        )
        rise, *counts = map(int, done.stdout.split())
        assert counts == [size, 0]
        return rise

    # All keys and counts take 16 bytes each. To read the file takes some 10 MiB in each of the two threads.
    assert peak(1 << 30) > 16 * size
    assert peak(16 << 20) < (16 << 20) + 2 * (16 << 20)


@pytest.mark.parametrize("is_list", [False, True])
def test_nulls_inside_a_dictionary_are_counted(tmp_path: Path, is_list: bool) -> None:
    """Arrow's `null_count` is of the indices alone (apache/arrow#38457)."""
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, 1, 2, None], pa.int8()), pa.array([5, None, 7]))
    if is_list:
        column = pa.ListArray.from_arrays(pa.array([0, 1, None, 2, 2]), pa.array([5, 7]).dictionary_encode())
    path = tmp_path / "log.arrow"
    arrow_file(path, pa.table({"user": column}))
    report = build_vocabulary(path, columns=["user"]).report
    assert (report.occurrences, report.nulls) == ((2, 1) if is_list else (2, 3))
