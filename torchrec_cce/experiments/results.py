"""The results file of an experiment: one row a trial."""

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_cce.errors import DataFileError
from torchrec_cce.experiments.agenda import Record
from torchrec_cce.experiments.outcome import Entropies, Outcome
from torchrec_cce.files.atomic import atomic_path
from torchrec_cce.training.sizes import Sizes

SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("method", pa.string()),
        ("cap", pa.int64()),
        ("seed", pa.int64()),
        ("learning_rate", pa.float64()),
        ("chosen", pa.bool_()),
        ("rate_at_end", pa.bool_()),
        ("validation_bce", pa.float64()),
        ("validation_auc", pa.float64()),
        ("test_bce", pa.float64()),
        ("test_auc", pa.float64()),
        ("steps", pa.int64()),
        ("seconds", pa.float64()),
        ("rows_per_second", pa.float64()),
        ("full_parameters", pa.int64()),
        ("parameters", pa.int64()),
        ("largest_factor", pa.float64()),
        ("table_bytes", pa.int64()),
        ("pointer_bytes", pa.int64()),
        ("device_pointer_bytes", pa.int64()),
        ("total_bytes", pa.int64()),
        ("full_bytes", pa.int64()),
        ("entropies", pa.list_(pa.float64())),
        ("random_entropies", pa.list_(pa.float64())),
        ("error", pa.string()),
        ("run", pa.string()),
        ("config", pa.string()),
        ("versions", pa.string()),
    ]
)
"""Of a file, as it is written."""
COLUMNS = tuple(SCHEMA.names)
"""What is read of a file; others are left alone."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One trial that came to its end."""

    name: str
    """Of the entry: a method with its settings, at any cap."""
    method: str
    cap: int | None
    """Trained parameters of a table at most; None for full tables."""
    seed: int
    learning_rate: float
    chosen: bool
    """Whether this learning rate is the entry's own at this cap. The others were only tried."""
    rate_at_end: bool
    """Whether the best rate was the lowest or the highest that was tried."""
    validation_bce: float
    validation_auc: float
    test_bce: float
    test_auc: float
    """NaN, like the three above, where there is none."""
    steps: int
    seconds: float
    rows_per_second: float
    full_parameters: int
    """`Σ n·d`: what full tables would train."""
    parameters: int
    """Trained parameters of all tables."""
    largest_factor: float
    """Full over trained parameters of the largest table."""
    table_bytes: int
    pointer_bytes: int
    """Of index pointers in host memory."""
    device_pointer_bytes: int
    """Of index pointers that live beside the tables."""
    total_bytes: int
    full_bytes: int
    entropies: tuple[float, ...]
    """`H1 … Hc` of the largest table's pointers, in nats; empty where none are learned."""
    random_entropies: tuple[float, ...]
    run: str
    """The folder of the run."""
    config: dict[str, Any]
    """The run's configuration."""
    versions: dict[str, Any]

    @property
    def is_finite(self) -> bool:
        """Whether the trial has a test loss and an AUC."""
        return math.isfinite(self.test_bce) and math.isfinite(self.test_auc)

    @property
    def largest_parameters(self) -> float:
        """Trained parameters of the largest table."""
        return self.largest_full_parameters / self.largest_factor

    @property
    def largest_full_parameters(self) -> int:
        """`n·d` of the largest table; of all tables where the configuration does not say."""
        sizes = [table["num_embeddings"] for table in self.config.get("tables", {}).values()]
        return max(sizes) * int(self.config["embedding"]["dim"]) if sizes else self.full_parameters


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A trial that ended in an error, or without a finite test loss and AUC."""

    name: str
    method: str
    cap: int | None
    seed: int
    learning_rate: float
    chosen: bool
    run: str | None
    """None where there is no folder."""
    error: str


@dataclass(frozen=True, kw_only=True)
class Results:
    """All of a file."""

    trials: tuple[Result, ...]
    """Those with a finite test loss and AUC, in the order of the file."""
    failures: tuple[Failure, ...]

    @property
    def chosen(self) -> list[Result]:
        """The trials at the tuned rates: those that count."""
        return [trial for trial in self.trials if trial.chosen]


def read_results(path: Path) -> Results:
    """Read a results file.

    Raises:
        DataFileError: no such file, no Parquet, or one that lacks a column; the message names all that are missing.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataFileError(f"{path}: cannot be read as a results file: {error}") from error
    missing = [column for column in COLUMNS if column not in table.column_names]
    if missing:
        raise DataFileError(f"{path}: lacks the columns {', '.join(missing)} of a results file")
    return results_of(table.select(list(COLUMNS)).to_pylist())


def results_of(rows: Sequence[dict[str, Any]]) -> Results:
    """The results that `rows` with the `COLUMNS` are."""
    trials, failures = [], []
    for row in rows:
        trial = None if row["error"] is not None else _trial(row)
        if trial is not None and trial.is_finite:
            trials.append(trial)
        else:
            failures.append(_failure(row, row["error"] or "it has no finite test BCE and AUC"))
    return Results(trials=tuple(trials), failures=tuple(failures))


def _trial(row: dict[str, Any]) -> Result:
    values = {column: row[column] for column in COLUMNS if column != "error"}
    for column in ("validation_bce", "validation_auc", "test_bce", "test_auc"):
        values[column] = math.nan if row[column] is None else row[column]
    for column in ("entropies", "random_entropies"):
        values[column] = tuple(row[column] or ())
    for column in ("config", "versions"):
        values[column] = json.loads(row[column] or "{}")
    return Result(**values)


def _failure(row: dict[str, Any], error: str) -> Failure:
    names = ("name", "method", "cap", "seed", "learning_rate", "chosen", "run")
    return Failure(**{name: row[name] for name in names}, error=error)


def write_results(path: Path, records: Sequence[Record], versions: Mapping[str, Any]) -> None:
    """Write a file, whole or not at all."""
    stamp = json.dumps(versions)
    rows = [{"versions": stamp, **_row(record)} for record in records]
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), temporary, compression="zstd")


def read_outcomes(path: Path, runs: Path) -> list[Outcome]:
    """The outcomes at the chosen learning rates, with the entropies of the largest table alone.

    Args:
        runs: the folder of the runs' folders.

    Raises:
        DataFileError: `path` is no results file.
    """
    return [_outcome(result, runs) for result in read_results(path).chosen]


def versions() -> dict[str, Any]:
    """What the results may depend on beside the plan."""
    return {
        "python": platform.python_version(),
        "torch": version("torch"),
        "torchrec": version("torchrec"),
        "fbgemm": version("fbgemm-gpu"),
        "numpy": version("numpy"),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
    }


def _row(record: Record) -> dict[str, Any]:
    key = record.key
    row: dict[str, Any] = {
        "name": key.setting.entry,
        "method": record.method,
        "cap": key.setting.cap,
        "seed": key.seed,
        "learning_rate": key.learning_rate,
        "chosen": record.chosen,
        "rate_at_end": record.rate_at_end,
        "error": record.ended.error,
        "run": record.run,
        "config": None if record.config is None else json.dumps(record.config.as_dict()),
    }
    outcome = record.ended.outcome
    if outcome is None:
        return row
    sizes = outcome.sizes
    entropies = outcome.entropies.get(sizes.largest_table)
    return row | {
        "validation_bce": outcome.validation_bce,
        "validation_auc": outcome.validation_auc,
        "test_bce": outcome.bce,
        "test_auc": outcome.auc,
        "steps": outcome.steps,
        "seconds": outcome.seconds,
        "rows_per_second": outcome.rows_per_second,
        "full_parameters": sizes.full_parameters,
        "parameters": sizes.parameters,
        "largest_factor": sizes.largest_factor,
        "table_bytes": sizes.table_bytes,
        "pointer_bytes": sizes.pointer_bytes,
        "device_pointer_bytes": sizes.device_pointer_bytes,
        "total_bytes": sizes.total_bytes,
        "full_bytes": sizes.full_bytes,
        "entropies": None if entropies is None else list(entropies.learned),
        "random_entropies": None if entropies is None else list(entropies.random),
    }


def _outcome(result: Result, runs: Path) -> Outcome:
    tables: dict[str, dict[str, int]] = result.config["tables"]
    largest = max(tables, key=lambda name: tables[name]["num_embeddings"])
    entropies = Entropies(learned=result.entropies, random=result.random_entropies)
    return Outcome(
        method=result.method,
        name=result.name,
        max_parameters=result.cap,
        seed=result.seed,
        learning_rate=result.learning_rate,
        validation_bce=result.validation_bce,
        validation_auc=result.validation_auc,
        bce=result.test_bce,
        auc=result.test_auc,
        sizes=Sizes(
            full_parameters=result.full_parameters,
            parameters=result.parameters,
            full_bytes=result.full_bytes,
            table_bytes=result.table_bytes,
            pointer_bytes=result.pointer_bytes,
            device_pointer_bytes=result.device_pointer_bytes,
            largest_table=largest,
            largest_factor=result.largest_factor,
        ),
        entropies={largest: entropies} if result.entropies else {},
        steps=result.steps,
        rows_per_second=result.rows_per_second,
        seconds=result.seconds,
        run_dir=str(runs / result.run),
    )
