"""Small logs, configurations of runs on them that take a second or two, and what is left of such runs."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.support.launch import Job, on_ranks
from torchrec_cce.experiments.planted_log import SyntheticLog, write_click_log
from torchrec_cce.maps.bundle import read_folder
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.training import loop
from torchrec_cce.training.config import RunConfig, parse_config

BATCH_SIZE = 65
BATCHES = 25
TRAINED = BATCHES * BATCH_SIZE + 1  # an odd size divides among no two ranks, and the last batch is one row
CLUSTERINGS = {"ct": 2, "cf": 8}
MAX_PARAMETERS = 3200
"""k = 100, so that k² is far above the number of IDs: few embeddings are equal, between which a rounding decides."""
NUM_ROWS = TRAINED + 700


def write_criteo_log(path: Path, *, num_rows: int = NUM_ROWS) -> Path:
    write_click_log(path, num_rows=num_rows, seed=0, log=SyntheticLog(universes=(1000, 800, *[50] * 24), clusters=8))
    return path


def write_parquet_log(path: Path, *, num_rows: int = NUM_ROWS) -> Path:
    """Write lists of which every third is empty, plain integers with nulls, and two dense fields."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, 5, num_rows) * (rng.random(num_rows) > 1 / 3)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    items = rng.integers(0, 1200, offsets[-1])
    users = rng.integers(0, 900, num_rows)
    clicked = rng.random(num_rows) < 0.2 + 0.6 * (users % 7 < 3)
    table = pa.table(
        {
            "label": clicked.astype(np.int64),
            "age": rng.random(num_rows),
            "price": rng.random(num_rows, dtype=np.float32),
            "items": pa.ListArray.from_arrays(pa.array(offsets), pa.array(items)),
            "user": pa.array(users, mask=rng.random(num_rows) < 0.1),
            "day": rng.integers(0, 7, num_rows).astype(np.int8),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=1000)
    return path


def splits(path: Path) -> dict[str, Any]:
    return {
        "train": {"path": str(path), "max_rows": TRAINED},
        "validation": {"path": str(path), "skip_rows": TRAINED, "max_rows": 333},
        "test": {"path": str(path), "skip_rows": TRAINED + 333},
    }


def criteo_config(path: Path, **changes: Any) -> RunConfig:
    """CCE on two large and one small feature, clustered twice; `changes` by section."""
    values: dict[str, Any] = {
        "data": {"format": "criteo", **splits(path)},
        "tables": {"C1": 1000, "C2": 800, "C3": 50},
        "embedding": {"max_parameters": MAX_PARAMETERS},
        "model": {"bottom": [16], "top": [16]},
        "recluster": CLUSTERINGS,
        "training": {"batch_size": BATCH_SIZE, "evaluate_every": 6},
    }
    return changed(values, changes)


def parquet_config(path: Path, **changes: Any) -> RunConfig:
    """Tables with mean and sum pooling, of bags of which many are empty."""
    values: dict[str, Any] = {
        "data": {"format": "parquet", "dense": ["age", "price"], "columns": {"item": "items"}, **splits(path)},
        "tables": {
            "item": {"num_embeddings": 1200, "pooling": "mean"},
            "t_user": {"num_embeddings": 900, "features": ["user"]},
            "day": 7,
        },
        "embedding": {"max_parameters": MAX_PARAMETERS},
        "model": {"bottom": [16], "top": [16]},
        "recluster": CLUSTERINGS,
        "training": {"batch_size": BATCH_SIZE, "evaluate_every": 6},
    }
    return changed(values, changes)


def changed(values: dict[str, Any], changes: dict[str, Any]) -> RunConfig:
    for section, change in changes.items():
        merges = isinstance(change, dict) and section != "tables"
        values[section] = {**values.get(section, {}), **change} if merges else change
    return parse_config(values)


def write_toml(path: Path, config: RunConfig) -> Path:
    """The file that `config` could have been read from, a line a section."""
    given = {key: value for key, value in config.as_dict().items() if value is not None}
    path.write_text("".join(f"{key} = {_toml(value)}\n" for key, value in given.items()))
    return path


def _toml(value: Any) -> str:
    if not isinstance(value, dict):
        return json.dumps(value)
    return "{" + ", ".join(f'"{key}" = {_toml(each)}' for key, each in value.items() if each is not None) + "}"


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run, without fields that depend on the clock."""
    clocks = {"time", "seconds", "rows_per_second"}
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in clocks} for line in lines]


def result(run_dir: Path) -> dict[str, Any]:
    """`result.json`, without fields that depend on the clock or the folder."""
    values = json.loads((run_dir / "result.json").read_text())
    return {k: v for k, v in values.items() if k not in {"rows_per_second", "recluster_seconds", "checkpoint"}}


def checkpoints(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("step-*"))


def train_and_log_every_batch(config: RunConfig, run_dir: Path, resume: bool = False) -> loop.RunResult:
    loop._LOG_EVERY = 1
    return loop.train(config, run_dir, start="resume" if resume else "new", show_progress=False)


def train_until(config: RunConfig, run_dir: Path, step: int) -> loop.RunResult:
    """Train as if somebody pressed Ctrl-C after batch `step`."""
    loop.StopRequest.on_any_rank = lambda _: step <= next(batches)  # type: ignore[method-assign]
    batches = itertools.count(1)
    return train_and_log_every_batch(config, run_dir)


def train_on(world_size: int, folder: Path, config: RunConfig, *, resume: bool = False) -> list[dict[str, Any]]:
    """The metrics of a run on so many ranks."""
    if world_size == 1:
        finished = [Job(folder / "job", train_and_log_every_batch, config, folder / "run", resume).wait()]
    else:
        finished = on_ranks(folder, world_size, train_and_log_every_batch, config, folder / "run", resume)
    for rank in finished:
        assert rank.code == 0, rank.stderr
    return metrics(folder / "run")


def assert_equal_metrics(first: list[dict[str, Any]], second: list[dict[str, Any]], tolerance: float) -> None:
    assert [(r["kind"], r["step"]) for r in first] == [(r["kind"], r["step"]) for r in second]
    for a, b in zip(first, second, strict=True):
        assert_close(a, b, tolerance)


def assert_close(first: dict[str, Any], second: dict[str, Any], tolerance: float) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        if isinstance(value, dict):
            assert_close(value, second[key], tolerance)
        elif value is None or isinstance(value, str):
            assert value == second[key]
        else:
            np.testing.assert_allclose(second[key], value, rtol=0, atol=tolerance, err_msg=f"{key} of {first}")


def train(config: RunConfig, run_dir: Path, *, resume: bool = False) -> loop.RunResult:
    return loop.train(config, run_dir, start="resume" if resume else "new", show_progress=False)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int | None) -> None:
    """Let runs stop as if somebody pressed Ctrl-C after batch `step`, or go on to their end if it is None."""
    batches = itertools.count(1)
    stops = (lambda _: False) if step is None else (lambda _: next(batches) >= step)
    monkeypatch.setattr(loop.StopRequest, "on_any_rank", stops)


def weights(run_dir: Path) -> dict[str, Any]:
    """Every tensor of the newest checkpoint: weights, optimizer state, map digests."""
    file = run_dir / "all.pt"
    dcp_to_torch_save(checkpoints(run_dir)[-1], file)
    flat: dict[str, Any] = {}

    def visit(path: str, value: Any) -> None:
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(child, dict | list):
                visit(f"{path}/{key}", child)
            else:
                flat[f"{path}/{key}"] = child

    visit("", torch.load(file, weights_only=False))
    return flat


def assert_same_run(first: Path, second: Path) -> None:
    assert metrics(first) == metrics(second)
    assert result(first) == result(second)
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, theirs[name]), name
        else:
            assert value == theirs[name], name
    tables = [maps_of(run_dir) for run_dir in (first, second)]
    assert tables[0].keys() == tables[1].keys()
    assert len(tables[0]) == 2
    for name, table in tables[0].items():
        assert table.pointer_map.digest == tables[1][name].pointer_map.digest
        np.testing.assert_array_equal(table.frequencies, tables[1][name].frequencies)  # type: ignore[arg-type]


def maps_folder(run_dir: Path) -> Path:
    (folder,) = checkpoints(run_dir)[-1].glob("maps/*")
    return folder


def maps_of(run_dir: Path) -> dict[str, TableSnapshot]:
    _, tables = read_folder(maps_folder(run_dir))
    return tables
