"""A split of several files, thinned out, is the log of just its rows: on any number of ranks and when resumed."""

import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support import runs
from tests.support.launch import on_ranks
from tests.support.remapped_files import World, remapped_config
from tests.support.runs import assert_equal_metrics, assert_same_run, stop_after, train, train_on
from torchrec_cce.errors import ConfigError, DataFileError
from torchrec_cce.training import loop
from torchrec_cce.training.config import RunConfig, parse_config

EVERY = 3
DAYS = (1000, 1, 2345, 1530, 900)
"""Rows of each file; the last is the day of validation and test."""


def train_lines(lines: list[Any]) -> list[Any]:
    return lines[: sum(DAYS[:-1])][::EVERY]


def last_day(lines: list[Any], part: int) -> list[Any]:
    return lines[sum(DAYS[:-1]) :][::EVERY][part::2]


def sampled(days: Path, pattern: str = "day_*") -> dict[str, Any]:
    last = str(days / pattern.replace("*", "11"))
    return {
        # Two digits and one: by name alone, day_10 would come first.
        "train": {"path": [str(days / pattern.replace("*", "[789]")), str(days / "day_10*")], "sample_every": EVERY},
        "validation": {"path": last, "sample_every": EVERY, "part": [0, 2]},
        "test": {"path": last, "sample_every": EVERY, "part": [1, 2]},
    }


@pytest.fixture(scope="module")
def criteo(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, RunConfig]:
    """One that reads day_7 … day_11, one of them compressed, and one that reads a file for each split."""
    folder = tmp_path_factory.mktemp("criteo")
    log = runs.write_criteo_log(folder / "log.tsv", num_rows=sum(DAYS))
    lines = log.read_bytes().splitlines(keepends=True)
    for day, size in enumerate(DAYS):
        start = sum(DAYS[:day])
        content = b"".join(lines[start : start + size])
        if day == 3:
            (folder / "day_10.gz").write_bytes(gzip.compress(content))
        else:
            (folder / f"day_{day + 7}").write_bytes(content)
    plain = {"train": train_lines(lines), "validation": last_day(lines, 0), "test": last_day(lines, 1)}
    for split, chosen in plain.items():
        (folder / f"{split}.tsv").write_bytes(b"".join(chosen))
    files = {split: {"path": str(folder / f"{split}.tsv")} for split in plain}
    return runs.criteo_config(log, data=sampled(folder)), runs.criteo_config(log, data=files)


def test_it_is_the_log_of_its_rows(
    criteo: tuple[RunConfig, RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_LOG_EVERY", 1)
    days, files = criteo
    train(days, tmp_path / "days")
    train(files, tmp_path / "files")
    assert_same_run(tmp_path / "days", tmp_path / "files")
    assert runs.result(tmp_path / "days")["steps"] == -(-len(train_lines([0] * sum(DAYS))) // runs.BATCH_SIZE)


def test_ranks_see_the_same_rows(criteo: tuple[RunConfig, RunConfig], tmp_path: Path) -> None:
    days, files = criteo
    two, one = train_on(2, tmp_path / "days", days), train_on(1, tmp_path / "files", files)
    assert_equal_metrics(one, two, 1e-6)


def test_a_resumed_run_sees_the_same_rows(
    criteo: tuple[RunConfig, RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the first file, and in the last one."""
    days, files = criteo
    train(files, tmp_path / "files")
    for i, step in enumerate((3, 20)):
        stop_after(monkeypatch, step)
        assert train(days, tmp_path / "days", resume=i > 0).interrupted
    stop_after(monkeypatch, None)
    train(days, tmp_path / "days", resume=True)
    assert_same_run(tmp_path / "days", tmp_path / "files")


def test_bags_in_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_LOG_EVERY", 1)
    log = runs.write_parquet_log(tmp_path / "log.parquet", num_rows=sum(DAYS))
    table = pq.read_table(log)
    for day, size in enumerate(DAYS):
        pq.write_table(table.slice(sum(DAYS[:day]), size), tmp_path / f"day_{day + 7}.parquet", row_group_size=100)
    numbers = list(range(table.num_rows))
    plain = {"train": train_lines(numbers), "validation": last_day(numbers, 0), "test": last_day(numbers, 1)}
    for split, rows in plain.items():
        pq.write_table(table.take(pa.array(rows)), tmp_path / f"{split}.parquet")
    files = {split: {"path": str(tmp_path / f"{split}.parquet")} for split in plain}
    train(runs.parquet_config(log, data=sampled(tmp_path, "day_*.parquet")), tmp_path / "days")
    train(runs.parquet_config(log, data=files), tmp_path / "files")
    assert_same_run(tmp_path / "days", tmp_path / "files")


def test_remapped_data(tmp_path: Path) -> None:
    """Of three files, Parquet and Arrow, the rows that are read of the raw log."""
    world = World(tmp_path)
    world.remapped("store")
    raw, remapped = str(world.raw), str(tmp_path / "remapped-store" / "part-?.*")
    for path, name in ((raw, "parquet"), (remapped, "remapped")):
        train_rows = {"path": path, "max_rows": 901, "sample_every": 2, "part": [1, 3]}
        data = {"train": train_rows, "validation": {"path": path, "skip_rows": 901, "part": [0, 2]}, "test": None}
        run_config = remapped_config(world.raw, world.url, format=name, data={"format": name, **data})
        train(run_config, tmp_path / name)
    assert_same_run(tmp_path / "parquet", tmp_path / "remapped")


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_missing_file_is_an_error_before_the_first_batch(
    criteo: tuple[RunConfig, RunConfig], tmp_path: Path, split: str
) -> None:
    days, _ = criteo
    values = days.as_dict()
    values["data"][split]["path"] = [values["data"]["test"]["path"], str(tmp_path / "day_12")]
    finished = on_ranks(tmp_path / "ranks", 2, train, parse_config(values), tmp_path / "run")
    assert [rank.code for rank in finished] == [1, 1]
    assert all("day_12: no such file or folder" in rank.stderr for rank in finished)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_split_without_rows_is_named(criteo: tuple[RunConfig, RunConfig], tmp_path: Path) -> None:
    days, _ = criteo
    values = days.as_dict()
    values["data"]["train"]["skip_rows"] = 10**6
    with pytest.raises(ConfigError, match=r"day_\[789\], .*day_10\*: no rows to train on"):
        train(parse_config(values), tmp_path / "run")


def test_one_missing_file_of_a_parquet_log(tmp_path: Path) -> None:
    log = runs.write_parquet_log(tmp_path / "log.parquet")
    config = runs.parquet_config(log, data={"test": {"path": [str(log), str(tmp_path / "gone.parquet")]}})
    with pytest.raises(DataFileError, match=r"gone\.parquet: no such file or folder"):
        train(config, tmp_path / "run")
