"""One process and two compute the same, on the same global batches."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torchrec.distributed.planner import ParameterConstraints

from tests.support import runs
from tests.support.launch import TIMEOUT, Job, on_ranks, wait_for_all
from tests.support.runs import assert_equal_metrics, train_and_log_every_batch, train_on, train_until
from tests.support.torchrun import torchrun
from torchrec_cce.sharding.sharders import SHARDING_TYPES
from torchrec_cce.training import loop, placement
from torchrec_cce.training.config import RunConfig

CRITEO: dict[str, dict[str, Any]] = {
    "rowwise_adagrad": {"optimizer": {"embedding": "rowwise_adagrad"}},
    "adagrad": {"optimizer": {"embedding": "adagrad"}},
    "sgd": {"optimizer": {"embedding": "sgd", "embedding_learning_rate": 0.5}},
    "adagrad with weight decay, replicated": {
        "optimizer": {"embedding": "adagrad", "embedding_weight_decay": 0.01},
        "recluster": {"ct": 1},  # a second one would make more of how all-reduce rounds
    },
    "adamw, replicated": {"optimizer": {"embedding": "adamw", "embedding_learning_rate": 0.01}},
    "narrow columns, replicated": {"embedding": {"num_columns": 8, "max_parameters": 800}},
    "weighed by frequency": {"recluster": {"weigh_by_frequency": True}},
}
PARQUET: dict[str, dict[str, Any]] = {
    "dlrm": {},
    "dlrm, weighed by frequency": {"recluster": {"weigh_by_frequency": True}},
    "gmf": {
        "model": {"name": "gmf"},
        "data": {"dense": []},
        "tables": {"item": {"num_embeddings": 1200, "pooling": "mean"}, "user": 900},
    },
}


@pytest.mark.parametrize("case", CRITEO)
def test_two_ranks_compute_what_one_does(case: str, log: Path, tmp_path: Path) -> None:
    config = runs.criteo_config(log, **CRITEO[case])
    one, two = (train_on(n, tmp_path / str(n), config) for n in (1, 2))
    assert sum(record["kind"] == "train" for record in one) == runs.BATCHES + 1
    assert sum(record["kind"] == "recluster" for record in one) == 2 * config.recluster.ct
    assert_equal_metrics(one, two, 1e-6)


@pytest.mark.parametrize("case", PARQUET)
def test_two_ranks_compute_what_one_does_on_bags(case: str, tmp_path: Path) -> None:
    config = runs.parquet_config(runs.write_parquet_log(tmp_path / "log.parquet"), **PARQUET[case])
    one, two = (train_on(n, tmp_path / str(n), config) for n in (1, 2))
    assert_equal_metrics(one, two, 1e-6)


def test_three_ranks_and_batches_of_two_rows(log: Path, tmp_path: Path) -> None:
    """Every batch has fewer rows than there are ranks."""
    config = runs.criteo_config(
        log,
        data={"train": {"path": str(log), "max_rows": 13}, "validation": {"path": str(log), "max_rows": 7}},
        training={"batch_size": 2, "evaluate_every": 5},
        recluster={"ct": 0},
    )
    one, three = (train_on(n, tmp_path / str(n), config) for n in (1, 3))
    assert_equal_metrics(one, three, 1e-6)


def train_twice(config: RunConfig, folder: Path) -> None:
    for name in ("first", "second"):
        train_and_log_every_batch(config, folder / name)


def test_several_runs_in_the_same_processes(log: Path, tmp_path: Path) -> None:
    """As torchrun starts them, with a store that lives longer than a run."""
    config = runs.criteo_config(log, recluster={"ct": 0}, data={"train": {"path": str(log), "max_rows": 200}})
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agent = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    jobs = [
        Job(tmp_path / str(rank), train_twice, config, tmp_path, RANK=str(rank), WORLD_SIZE="2", **agent)
        for rank in range(2)
    ]
    for rank in wait_for_all(jobs):
        assert rank.code == 0, rank.stderr
    assert runs.metrics(tmp_path / "first") == runs.metrics(tmp_path / "second")


def test_a_bad_row_ends_all_ranks_with_the_same_error(log: Path, tmp_path: Path) -> None:
    lines = log.read_text().splitlines()
    lines[1000] = lines[1000].rsplit("\t", 1)[0] + "\tno-hex"
    (tmp_path / "bad.tsv").write_text("\n".join(lines) + "\n")
    config = runs.criteo_config(tmp_path / "bad.tsv")
    for rank in on_ranks(tmp_path, 2, train_and_log_every_batch, config, tmp_path / "run"):
        assert rank.code == 1
        assert rank.stderr.splitlines()[-1].startswith(f"torchrec_cce.errors.DataFileError: {tmp_path}/bad.tsv:1001: ")


def test_torchrun_interrupted_and_resumed(log: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches torchrun, which passes it on; `--resume` then ends where an undisturbed run does."""
    config = runs.criteo_config(log, training={"batch_size": runs.BATCH_SIZE, "evaluate_every": 6, "epochs": 4})
    finished = Job(tmp_path / "job", loop.train, config, tmp_path / "undisturbed").wait()
    assert finished.code == 0, finished.stderr
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "torchrec_cce.training", str(runs.write_toml(tmp_path / "run.toml", config))]
    command += ["--run-dir", str(run_dir), "--quiet"]

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for_metrics(run_dir, process)
        finally:
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0
    assert "continue with --resume" in errors
    assert len(runs.checkpoints(run_dir)) == 1
    assert json.loads((run_dir / "result.json").read_text())["interrupted"] is True

    with torchrun(tmp_path, config, "--resume"):
        pass
    assert_equal_metrics(runs.metrics(tmp_path / "undisturbed"), runs.metrics(run_dir), 1e-6)


def test_a_checkpoint_is_resumed_on_another_number_of_ranks(log: Path, tmp_path: Path) -> None:
    config = runs.criteo_config(log, recluster={**runs.CLUSTERINGS, "weigh_by_frequency": True})
    expected = train_on(1, tmp_path / "undisturbed", config)
    for before, after in ((1, 2), (2, 4), (4, 1)):  # one rank holds tables whole, several split them by rows
        folder = tmp_path / f"{before}-{after}"
        for rank in on_ranks(folder, before, train_until, config, folder / "run", 11):
            assert rank.code == 0, rank.stderr
            assert rank.value.interrupted
        assert_equal_metrics(expected, train_on(after, folder, config, resume=True), 1e-6)


def as_placed(kind: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of this file where all tables are placed in one way."""

    def constraints(**given: Any) -> ParameterConstraints:
        return ParameterConstraints(**given | {"sharding_types": [kind]})

    placement.ParameterConstraints = constraints  # type: ignore[assignment,misc]
    return function(*arguments)


def placed(run_dir: Path) -> set[str]:
    return {one["sharding_type"] for one in json.loads((run_dir / "plan.json").read_text()).values()}


@pytest.mark.parametrize("kind", SHARDING_TYPES)
def test_every_placement_computes_what_one_process_does(kind: str, tmp_path: Path) -> None:
    """Of batches that do not divide among the ranks, down to one row, and of bags that may be empty."""
    config = runs.parquet_config(runs.write_parquet_log(tmp_path / "log.parquet"), recluster={"ct": 0})
    expected = train_on(1, tmp_path / "one", config)
    for rank in on_ranks(tmp_path / kind, 2, as_placed, kind, train_and_log_every_batch, config, tmp_path / "run"):
        assert rank.code == 0, rank.stderr
    assert placed(tmp_path / "run") == {kind}
    assert_equal_metrics(expected, runs.metrics(tmp_path / "run"), 1e-6)


# The two others differ in the shape of their state alone, which test_resume carries over for each optimizer.
@pytest.mark.parametrize(
    "optimizer",
    [
        "rowwise_adagrad",
        pytest.param("adagrad", marks=pytest.mark.nightly),
        pytest.param("sgd", marks=pytest.mark.nightly),
    ],
)
def test_a_checkpoint_is_resumed_under_another_placement(log: Path, tmp_path: Path, optimizer: str) -> None:
    """From tables split by rows to replicated ones and back, the optimizer's state carried over.

    No clustering comes after: kernels round differently, and k-means makes more of that.
    """
    config = runs.criteo_config(log, optimizer={"embedding": optimizer}, recluster={"ct": 1, "cf": 8})
    expected = train_on(1, tmp_path / "undisturbed", config)
    by_rows, replicated = "row_wise", "data_parallel"
    for before, ranks, after in ((by_rows, 2, replicated), (replicated, 2, by_rows), (replicated, 1, "table_wise")):
        folder = tmp_path / f"{before}-{ranks}-{after}"
        start = (as_placed, before, train_until, config, folder / "run", 11)
        resume = (as_placed, after, train_and_log_every_batch, config, folder / "run", True)
        for kind, (function, *arguments) in ((before, start), (after, resume)):
            for rank in on_ranks(folder, ranks, function, *arguments):
                assert rank.code == 0, rank.stderr
            assert placed(folder / "run") == {kind}
        assert_equal_metrics(expected, runs.metrics(folder / "run"), 1e-6)


def test_a_checkpoint_of_another_optimizer_is_refused(log: Path, tmp_path: Path) -> None:
    config = runs.criteo_config(log, optimizer={"embedding": "sgd"})
    train_on(1, tmp_path, config)
    stored = tmp_path / "run" / "config.json"
    changed = runs.criteo_config(log, optimizer={"embedding": "rowwise_adagrad"})
    stored.write_text(json.dumps(changed.as_dict()))
    for digests in (tmp_path / "run").rglob("digests.json"):  # which know the file as it was
        digests.unlink()
    (rank,) = on_ranks(tmp_path, 1, train_and_log_every_batch, changed, tmp_path / "run", True)
    last = rank.stderr.splitlines()[-1]
    assert re.search(r"ConfigError: the checkpoint has no '(sum|step)' of the optimizer for 'dlrm\.sparse_arch", last)
    assert "but nothing; it was trained with another optimizer" in last


def wait_for_metrics(run_dir: Path, process: subprocess.Popen[str]) -> None:
    """Until the first metrics are on disk, of a process that still runs."""
    file, deadline = run_dir / "metrics.jsonl", time.monotonic() + TIMEOUT
    while not (file.exists() and file.stat().st_size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
