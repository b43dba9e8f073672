"""Small logs and configurations of runs that take a second or two."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_cce.experiments.planted_log import SyntheticLog, write_click_log
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
    """Lists with every third bag empty, plain integers with nulls, and two dense columns."""
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
    return _changed(values, changes)


def parquet_config(path: Path, **changes: Any) -> RunConfig:
    """Mean and sum pooling of bags of which many are empty."""
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
    return _changed(values, changes)


def _changed(values: dict[str, Any], changes: dict[str, Any]) -> RunConfig:
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
    """The records of a run without what depends on the clock."""
    clocks = {"time", "seconds", "rows_per_second"}
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in clocks} for line in lines]


def result(run_dir: Path) -> dict[str, Any]:
    """`result.json` without what depends on the clock or the folder."""
    values = json.loads((run_dir / "result.json").read_text())
    return {k: v for k, v in values.items() if k not in {"rows_per_second", "recluster_seconds", "checkpoint"}}


def checkpoints(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("step-*"))
