"""What is left when processes die: the command, at whatever moment, and a worker."""

import json
import multiprocessing
import os
import random
import signal
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.support import runs
from tests.support.bench_plans import plan, values
from tests.support.launch import Job, command
from torchrec_cce.experiments import runner
from torchrec_cce.experiments.plan import read_plan
from torchrec_cce.experiments.results import TrialResult
from torchrec_cce.experiments.runner import bench
from torchrec_cce.experiments.trial import Trial

DIED = "its process died: killed, or out of memory; run the plan again to try it again"
CLOCKS = ["seconds", "rows_per_second"]
METHODS = (
    {"method": "full", "learning_rates": [0.1]},
    {"method": "cce", "training": {"checkpoint_every": 4}},
    {"method": "pq", "learning_rates": [0.1], "derive": {"from": "full"}, "training": {"epochs": 0}},
)
TRIALS = 2 + 3 + 2


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if not isinstance(value, dict):
        return json.dumps(value)
    return "{" + ", ".join(f'"{key}" = {_toml(each)}' for key, each in value.items() if each is not None) + "}"


def write_plan(folder: Path) -> Path:
    log = runs.write_criteo_log(folder / "log.tsv")
    given = values(log, *METHODS)
    path = folder / "plan.toml"
    path.write_text("".join(f"{key} = {_toml(value)}\n" for key, value in given.items()))
    return path


def rows(folder: Path) -> list[dict[str, Any]]:
    """Of the results file, without what depends on the clock or the folder."""
    found = pq.read_table(folder / "results.parquet").drop_columns(CLOCKS).to_pylist()
    for row in found:
        row["config"] = json.loads(row["config"])
        if row["config"]["derive"]:
            row["config"]["derive"]["run"] = Path(row["config"]["derive"]["run"]).name
    return found


def ended(folder: Path) -> int:
    return len(list(folder.glob("runs/*/ended.json")))


def start(folder: Path, path: Path, out: Path, *, workers: int) -> Job:
    return command(folder, "bench", path, "--out", out, "--workers", str(workers), "--quiet")


def test_killed_at_random_moments_it_comes_to_the_same(tmp_path: Path) -> None:
    """As what one process does alone, which waits for no worker to start."""
    path, rng = write_plan(tmp_path), random.Random(0)
    bench(read_plan(path), tmp_path / "undisturbed", show_progress=False)
    out = tmp_path / "killed"
    for number, reached in enumerate((1, 4)):
        job = start(tmp_path / f"process-{number}", path, out, workers=1)
        job.wait_for(lambda reached=reached: any(out.glob("runs/*/begun.json")) and ended(out) >= reached)
        time.sleep(rng.uniform(0, 0.3))
        os.kill(job.pid, signal.SIGKILL)
        assert job.wait().code == -signal.SIGKILL
    assert ended(out) < TRIALS, "it was killed before its end"
    last = start(tmp_path / "last", path, out, workers=1).wait()
    assert (last.code, last.stderr) == (0, "")
    assert f"results: {tmp_path}/killed/results.parquet" in last.stdout
    assert rows(out) == rows(tmp_path / "undisturbed")
    assert len(rows(out)) == TRIALS
    assert not list(out.glob("runs/*/checkpoints"))


def test_ctrl_c_leaves_results_and_no_worker(tmp_path: Path) -> None:
    path = write_plan(tmp_path)
    job = start(tmp_path / "process", path, tmp_path / "out", workers=2)
    job.wait_for(lambda: ended(tmp_path / "out") > 2)  # two may not have been noticed yet
    os.kill(job.pid, signal.SIGINT)
    finished = job.wait()
    assert finished.code == 130, finished.stderr
    (line,) = finished.stderr.splitlines()
    assert (
        line == f"interrupted; the same command goes on, and the results so far are in {tmp_path}/out/results.parquet"
    )
    assert rows(tmp_path / "out")


def test_a_worker_that_dies_is_a_row_and_is_replaced(tmp_path: Path) -> None:
    log = runs.write_criteo_log(tmp_path / "log.tsv")
    given = plan(log, *METHODS[:2], learning_rates=[0.1], seeds=[7])

    def kill_the_first() -> None:
        while not any((tmp_path / "runs").glob("*/metrics.jsonl")):
            time.sleep(0.005)
        for child in multiprocessing.active_children():
            child.kill()

    killer = threading.Thread(target=kill_the_first, daemon=True)
    killer.start()
    first, second = bench(given, tmp_path, workers=1, show_progress=False)
    killer.join()
    assert first.error == DIED
    assert second.sizes is not None
    again = bench(given, tmp_path, workers=1, show_progress=False)
    assert [result.error for result in again] == [None, None]
    assert again[1] == second


def answer_at_length(trial: Trial) -> TrialResult:
    """In a worker: a large answer, in the middle of which the worker of the first trial is killed."""
    send = Connection._send  # type: ignore[attr-defined]

    def send_half_and_die(connection: Connection, content: memoryview) -> None:
        send(connection, content[: max(len(content) // 2, 16)])
        if len(content) > 16:
            os.kill(os.getpid(), signal.SIGKILL)

    if trial.run_dir.name.startswith("full-"):
        Connection._send = send_half_and_die  # type: ignore[attr-defined]
    return trial.result("x" * (1 << 20))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_dies_in_the_middle_of_a_large_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Its trial says so, and the others go on."""
    monkeypatch.setattr(runner, "_run_in_worker", answer_at_length)
    log = runs.write_criteo_log(tmp_path / "log.tsv")
    methods = [{"method": method} for method in ("full", "cce", "hashing_trick")]
    results = bench(
        plan(log, *methods, learning_rates=[0.1], seeds=[7]), tmp_path, workers=workers, show_progress=False
    )
    assert [(result.method, result.error) for result in results] == [
        ("full", DIED),
        ("cce", "x" * (1 << 20)),
        ("hashing_trick", "x" * (1 << 20)),
    ]
