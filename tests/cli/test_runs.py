"""The commands as a user runs them: exit status, the one line that says what is wrong, and what is left on the disk."""

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support import runs
from tests.support.launch import Finished, command
from torchrec_cce.maps.bundle import read_folder

SCRIPT = Path(sys.executable).with_name("torchrec-cce")
METHODS = ["full", "hashing_trick", "ce_concat", "cce", "cce_residents"]


def run(folder: Path, *arguments: str | Path) -> Finished:
    return command(folder / "process", *arguments).wait()


# train and evaluate


@pytest.fixture(scope="module")
def trained(log: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, "subprocess.CompletedProcess[str]"]:
    """A run by the installed script, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    path = runs.write_toml(folder / "run.toml", runs.criteo_config(log))
    finished = subprocess.run(
        [SCRIPT, "train", path, "--run-dir", folder / "run"], capture_output=True, text=True, timeout=120, check=False
    )
    return folder / "run", finished


def test_train(trained: tuple[Path, "subprocess.CompletedProcess[str]"]) -> None:
    run_dir, finished = trained
    assert finished.returncode == 0, finished.stderr
    (line,) = finished.stderr.splitlines()  # no warning of a library either
    best = json.loads((run_dir / "result.json").read_text())["best"]
    assert line.startswith(f"finished after {runs.BATCHES + 1} batches, step {best['step']}, validation_bce ")
    assert f", test_auc {best['test_auc']:.5g}; " in line

    assert json.loads((run_dir / "config.json").read_text())["tables"]["C1"]["num_embeddings"] == 1000
    records = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert {record["kind"] for record in records} == {"train", "validation", "test", "recluster"}
    assert [r["generation"] for r in records if r["kind"] == "recluster" and r["table"] == "C1"] == [1, 2]
    assert list((run_dir / "tensorboard").glob("events.*"))
    (checkpoint,) = runs.checkpoints(run_dir)
    (folder,) = checkpoint.glob("maps/*")
    _, tables = read_folder(folder)
    assert {name: table.pointer_map.generation for name, table in tables.items()} == {"C1": 2, "C2": 2}


def test_evaluate(trained: tuple[Path, "subprocess.CompletedProcess[str]"], log: Path, tmp_path: Path) -> None:
    """The newest checkpoint is that of the last batch, whose test metrics are the last of the run."""
    run_dir, _ = trained
    finished = run(tmp_path, "evaluate", run_dir)
    assert (finished.code, finished.stderr) == (0, "")
    best = json.loads((run_dir / "result.json").read_text())["best"]
    assert best["step"] == runs.BATCHES + 1, "the run ended at its best, or this compares two different models"
    found = json.loads(finished.stdout)
    assert found["bce"] == pytest.approx(best["test_bce"], abs=1e-6)
    assert found["auc"] == pytest.approx(best["test_auc"], abs=1e-6)
    assert found["rows"] == runs.NUM_ROWS - runs.TRAINED - 333

    whole = run(tmp_path, "evaluate", run_dir, "--data", log)
    assert json.loads(whole.stdout)["rows"] == runs.NUM_ROWS


def test_a_mistake_is_one_line_of_a_real_process(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('seed = 1\n[data]\nformat = "cvs"\n')
    finished = subprocess.run(
        [sys.executable, "-m", "torchrec_cce.training", tmp_path / "run.toml", "--run-dir", tmp_path / "run"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert (
        line
        == f"error: {tmp_path}/run.toml:3: data.format: Input should be 'criteo', 'parquet' or 'remapped'; found 'cvs'"
    )
    assert not (tmp_path / "run").exists()


def missing(path: Path) -> str:
    path.unlink()
    return f"{path}: no such file or folder"


def truncated_gzip(path: Path) -> str:
    content = gzip.compress(path.read_bytes())
    path.write_bytes(content[: len(content) // 2])
    return rf"{path}:\d+: the gzip stream ends here"


def a_column_less(path: Path) -> str:
    return change_line(path, 1200, lambda line: line.rsplit(b"\t", 1)[0])


def no_hexadecimal(path: Path) -> str:
    return change_line(path, 1300, lambda line: line.rsplit(b"\t", 1)[0] + b"\txyz")


def a_label_of_two(path: Path) -> str:
    return change_line(path, 7, lambda line: b"2" + line[1:])


def change_line(path: Path, number: int, change: Callable[[bytes], bytes]) -> str:
    lines = path.read_bytes().splitlines()
    lines[number - 1] = change(lines[number - 1])
    path.write_bytes(b"\n".join(lines) + b"\n")
    return f"{path}:{number}: "


@pytest.mark.parametrize("damage", [missing, truncated_gzip, a_column_less, no_hexadecimal, a_label_of_two])
def test_a_damaged_log_is_named_with_its_line(log: Path, tmp_path: Path, damage: Callable[[Path], str]) -> None:
    path = tmp_path / ("log.tsv.gz" if damage is truncated_gzip else "log.tsv")
    path.write_bytes(log.read_bytes())
    expected = damage(path)
    config = runs.write_toml(tmp_path / "run.toml", runs.criteo_config(path))
    assert_refused(run(tmp_path, "train", config, "--run-dir", tmp_path / "run"), expected)


def assert_refused(finished: Finished, pattern: str) -> None:
    """Exit status 2 and one line."""
    assert finished.code == 2, finished.stderr
    (line,) = finished.stderr.splitlines()
    assert re.match(f"error: {pattern}", line), line
    assert "Traceback" not in finished.stdout


def test_a_column_that_parquet_does_not_have(tmp_path: Path) -> None:
    path = runs.write_parquet_log(tmp_path / "log.parquet")
    config = runs.parquet_config(path, data={"columns": {"item": "itmes"}})
    toml = runs.write_toml(tmp_path / "run.toml", config)
    finished = run(tmp_path, "train", toml, "--run-dir", tmp_path / "run")
    assert_refused(finished, f"{path}: there is no column 'itmes'; the columns are ")


def test_a_folder_that_is_taken(trained: tuple[Path, object], log: Path, tmp_path: Path) -> None:
    run_dir, _ = trained
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    config = runs.write_toml(tmp_path / "run.toml", runs.criteo_config(log))
    finished = run(tmp_path, "train", config, "--run-dir", run_dir)
    assert_refused(finished, f"{run_dir} holds a run already; resume it or choose another folder")
    changed = runs.write_toml(tmp_path / "changed.toml", runs.criteo_config(log, seed=9, embedding={"dim": 32}))
    finished = run(tmp_path, "train", changed, "--run-dir", run_dir, "--resume")
    assert_refused(finished, rf"{run_dir} was started with other values in \['embedding', 'seed'\]; resume with ")
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_a_start_that_failed_leaves_the_folder_free(log: Path, tmp_path: Path) -> None:
    late = tmp_path / "late.tsv"
    toml = runs.write_toml(tmp_path / "run.toml", runs.criteo_config(late))
    assert_refused(run(tmp_path / "first", "train", toml, "--run-dir", tmp_path / "run"), f"{late}")
    late.write_bytes(log.read_bytes())
    assert run(tmp_path / "second", "train", toml, "--run-dir", tmp_path / "run", "--quiet").code == 0


def test_no_run(log: Path, tmp_path: Path) -> None:
    config = runs.write_toml(tmp_path / "run.toml", runs.criteo_config(log))
    finished = run(tmp_path, "train", config, "--run-dir", tmp_path / "none", "--resume")
    assert_refused(finished, f"{tmp_path}/none: no config.json, so there is no run in this folder")
    assert_refused(run(tmp_path, "evaluate", tmp_path / "none"), f"{tmp_path}/none: no config.json")


def test_a_run_folder_that_is_a_file(log: Path, tmp_path: Path) -> None:
    config = runs.write_toml(tmp_path / "run.toml", runs.criteo_config(log))
    assert_refused(run(tmp_path, "train", config, "--run-dir", config), r".*run\.toml")


def test_evaluate_needs_a_log(log: Path, tmp_path: Path) -> None:
    config = runs.criteo_config(log, data={"validation": None, "test": None}, recluster={"ct": 0})
    toml = runs.write_toml(tmp_path / "run.toml", config)
    assert run(tmp_path, "train", toml, "--run-dir", tmp_path / "run", "--quiet").code == 0
    assert_refused(
        run(tmp_path, "evaluate", tmp_path / "run"), f"{tmp_path}/run has no test split; name a log with --data"
    )
    finished = run(tmp_path, "evaluate", tmp_path / "run", "--data", tmp_path / "no.tsv")
    assert_refused(finished, f"{tmp_path}/no.tsv: no such file or folder")


def test_quiet_says_one_line_only(log: Path, tmp_path: Path) -> None:
    toml = runs.write_toml(tmp_path / "run.toml", runs.criteo_config(log, recluster={"ct": 1, "cf": 3, "rest": 2}))
    finished = run(tmp_path, "train", toml, "--run-dir", tmp_path / "run", "--quiet")
    assert (finished.code, finished.stdout) == (0, "")
    (line,) = finished.stderr.splitlines()
    assert line.startswith("finished after 5 batches")


# demo


def demo(folder: Path, *arguments: str | Path) -> Finished:
    return command(folder / "process", "demo", "--out", folder / "demo", "--max-rows", "3000", *arguments).wait()


def assert_demo(finished: Finished, folder: Path) -> None:
    assert finished.code == 0, finished.stderr
    assert finished.stderr == ""
    first_words = [line.split()[0] for line in finished.stdout.splitlines() if line.split()]
    assert [word for word in first_words if word in METHODS][-len(METHODS) :] == METHODS
    report = json.loads((folder / "demo" / "report.json").read_text())
    assert [outcome["method"] for outcome in report["outcomes"]] == METHODS
    assert report["outcomes"][-1]["sizes"]["pointer_bytes"] > 0
    assert report["outcomes"][-1]["entropies"]
    HTMLParser().feed((folder / "demo" / "report.html").read_text())
    assert str(folder / "demo" / "report.html") in finished.stdout.replace("\n", "")


def test_demo(tmp_path: Path) -> None:
    finished = demo(tmp_path)
    assert_demo(finished, tmp_path)
    assert "best possible AUC" in finished.stdout


def test_demo_on_a_criteo_log(log: Path, tmp_path: Path) -> None:
    old = tmp_path / "demo" / "runs" / "old.txt"
    old.parent.mkdir(parents=True)
    for path in (old, tmp_path / "demo" / ".torchrec-cce-demo"):
        path.touch()
    finished = demo(tmp_path, "--data", log)
    assert_demo(finished, tmp_path)
    assert not old.exists(), "an older demo goes"
    assert f"log: {log}" in finished.stdout.replace("\n", "")


def test_demo_on_parquet_with_lists(tmp_path: Path) -> None:
    path = runs.write_parquet_log(tmp_path / "log.parquet")
    finished = demo(tmp_path, "--data", path)
    assert_demo(finished, tmp_path)
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    config = json.loads((Path(report["outcomes"][0]["run_dir"]) / "config.json").read_text())
    assert [table["features"] for table in config["tables"].values()] == [["items"], ["user"], ["day"]]
    assert config["data"]["dense"] == ["age", "price"]


def test_demo_on_columns_of_all_kinds(tmp_path: Path) -> None:
    """Names that PyTorch reserves, lists of fixed size, floats in lists, text, a feature that is always empty."""
    n = 400
    table = pa.table(
        {
            "clicked": [i % 3 == 0 for i in range(n)],
            "type": [i % 300 for i in range(n)],
            "user.id": pa.array([i * 7919 % 350 for i in range(n)], pa.uint64()),
            "pair": pa.array([[i, i + 1] for i in range(n)], pa.list_(pa.int32(), 2)),
            "vector": [[0.5, 1.5]] * n,
            "text": ["words"] * n,
            "never": pa.array([None] * n, pa.int64()),
            "price": [i / n for i in range(n)],
        }
    )
    pq.write_table(table, tmp_path / "log.parquet")
    finished = demo(tmp_path, "--data", tmp_path / "log.parquet", "--label", "clicked")
    assert_demo(finished, tmp_path)


def test_demo_clears_only_what_a_demo_made(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "thesis.tex").write_text("years of work")
    assert_refused(demo(tmp_path), f"{tmp_path}/demo is not empty and not of an older demo; choose another folder")
    assert (tmp_path / "demo" / "thesis.tex").read_text() == "years of work"


def test_demo_does_not_clear_its_own_input(log: Path, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / ".torchrec-cce-demo").touch()
    (folder / "clicks.tsv").write_bytes(log.read_bytes())
    assert_refused(demo(tmp_path, "--data", folder / "clicks.tsv"), f"{folder}/clicks.tsv is in {folder}, which is ")
    assert_refused(demo(tmp_path, "--data", tmp_path / "no.tsv"), f"{tmp_path}/no.tsv: no such file or folder")
    assert (folder / "clicks.tsv").exists()
