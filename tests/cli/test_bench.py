"""`torchrec-cce bench` as a user runs it; what is interrupted and killed is in tests/experiments/test_kills.py."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support.launch import command

PLAN = """caps = [10]
methods = [{method = "low_rank"}]
[run]
tables = {C1 = 1000}
[run.data]
format = "criteo"
train = {path = "log.tsv"}
validation = {path = "log.tsv"}
test = {path = "log.tsv"}
"""


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    (tmp_path / "plan.toml").write_text(PLAN.replace("log.tsv", str(tmp_path / "log.tsv")))
    return tmp_path


def test_a_bad_plan_is_one_line_and_leaves_nothing(workplace: Path) -> None:
    (workplace / "plan.toml").write_text(PLAN.replace("low_rank", "lowrank"))
    finished = command(workplace / "process", "bench", workplace / "plan.toml", "--out", workplace / "out").wait()
    assert finished.code == 2
    (line,) = finished.stderr.splitlines()
    assert line.startswith(f"error: {workplace}/plan.toml:2: methods.0.method: Input should be 'full', ")
    assert not (workplace / "out").exists()


def test_a_log_that_is_missing(workplace: Path) -> None:
    finished = command(workplace / "process", "bench", workplace / "plan.toml", "--out", workplace / "out").wait()
    assert (finished.code, finished.stderr) == (2, f"error: {workplace}/log.tsv: no such file or folder\n")


def test_what_failed_is_said_and_where_all_failed_the_status_is_1(workplace: Path) -> None:
    (workplace / "log.tsv").touch()
    arguments = ("bench", workplace / "plan.toml", "--out", workplace / "out", "--workers", "1", "--quiet")
    finished = command(workplace / "process", *arguments).wait()
    assert finished.code == 1
    said = "failed: low_rank at 10, seed 0: table 'C1': max_parameters=10 is too little for low_rank; at least 1016 "
    assert finished.stderr.startswith(said)
    assert finished.stdout.endswith(f"results: {workplace}/out/results.parquet\n")
    (row,) = pq.read_table(workplace / "out" / "results.parquet").to_pylist()
    assert (row["method"], row["chosen"], row["test_bce"], row["config"]) == ("low_rank", True, None, None)
