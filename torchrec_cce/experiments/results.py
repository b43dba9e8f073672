"""`TrialResult`: what a trial came to, and the results file of an experiment, which has a row for each."""

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_cce.errors import DataFileError
from torchrec_cce.files.atomic import atomic_path
from torchrec_cce.training.model import Sizes

RESULTS = "results.parquet"
"""In the folder of an experiment: its results file."""
RUNS = "runs"
"""Beside it: the folder that holds those of the runs."""
_QUALITIES = ("validation_bce", "validation_auc", "test_bce", "test_auc")
SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("method", pa.string()),
        ("cap", pa.int64()),
        ("seed", pa.int64()),
        ("learning_rate", pa.float64()),
        ("chosen", pa.bool_()),
        ("rate_at_end", pa.bool_()),
        *((quality, pa.float64()) for quality in _QUALITIES),
        ("steps", pa.int64()),
        ("seconds", pa.float64()),
        ("rows_per_second", pa.float64()),
        ("full_parameters", pa.int64()),
        ("parameters", pa.int64()),
        ("largest_factor", pa.float64()),
        ("table_bytes", pa.int64()),
        ("pointer_bytes", pa.int64()),
        ("device_pointer_bytes", pa.int64()),
        ("resident_bytes", pa.int64()),
        ("training_bytes", pa.int64()),
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
"""The columns of a results file. When one is read, other columns are left alone."""
_LATER_COLUMNS = {"resident_bytes", "training_bytes"}
"""Those that older files lack."""
_STORED_SIZES = tuple(size.name for size in fields(Sizes) if size.name != "largest_table")
_NOT_FINITE = "it has no finite test BCE and AUC"


@dataclass(frozen=True, kw_only=True)
class Entropies:
    """How the pointers of one table are spread (Appendix G), in nats."""

    learned: tuple[float, ...] = ()
    """`H1 … Hc`: the smallest entropy of any 1, 2, … c columns together. Near 0 they have collapsed."""
    random: tuple[float, ...] = ()
    """The same for pointers by hashes. Where `learned` is as large as this, nothing was learned."""


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """What one trial came to: an entry of a plan, under one cap, at one learning rate and from one seed.

    A trial that ended in an error before it was trained has no sizes, and no quality; one that diverged has sizes and
    an error.
    """

    name: str
    """The name of the entry: a method with its settings, under any cap."""
    method: str
    max_parameters: int | None
    """Trained parameters of a table at most; None for full tables."""
    seed: int
    learning_rate: float
    """Of the embedding tables."""
    chosen: bool = False
    """Whether this learning rate is the entry's own under this cap. The others were only tried."""
    rate_at_end: bool = False
    """Whether the chosen rate is the lowest or the highest of several that were tried."""
    validation_bce: float = math.nan
    """The lowest of the run."""
    validation_auc: float = math.nan
    """When the validation BCE is the lowest; so are the two below."""
    test_bce: float = math.nan
    test_auc: float = math.nan
    steps: int = 0
    """Batches that were trained."""
    seconds: float = math.nan
    """The time of the whole run, with its start, reading, evaluations and clusterings."""
    rows_per_second: float = math.nan
    """Of training alone."""
    sizes: Sizes | None = None
    entropies: dict[str, Entropies] = field(default_factory=dict)
    """Table with learned pointers → how these are spread after the last clustering."""
    error: str | None = None
    run: str | None = None
    """The name of the run's folder; None if there is none."""
    config: dict[str, Any] = field(default_factory=dict)
    """The run's configuration; empty if there can be none."""
    versions: dict[str, Any] = field(default_factory=dict)
    """What the result may depend on beside the plan, as its file says."""

    @property
    def failure(self) -> str | None:
        """Why the trial has no finite test loss and AUC that count; None if it has."""
        finite = self.sizes is not None and math.isfinite(self.test_bce) and math.isfinite(self.test_auc)
        return self.error or (None if finite else _NOT_FINITE)

    @property
    def largest_entropies(self) -> Entropies:
        """Those of the largest table; empty if its pointers are not learned."""
        return self.entropies.get(self.sizes.largest_table if self.sizes else "", Entropies())

    @property
    def largest_full_parameters(self) -> int:
        """`n·d` of the largest table; of all tables where the configuration does not say."""
        assert self.sizes is not None
        tables = [table["num_embeddings"] for table in self.config.get("tables", {}).values()]
        return max(tables) * int(self.config["embedding"]["dim"]) if tables else self.sizes.full_parameters

    @property
    def largest_parameters(self) -> float:
        """Trained parameters of the largest table."""
        assert self.sizes is not None
        return self.largest_full_parameters / self.sizes.largest_factor

    def row(self) -> dict[str, Any]:
        """The result by the columns of a results file; None where a trial that failed has nothing to say."""
        row: dict[str, Any] = dict.fromkeys(SCHEMA.names)
        for column in ("name", "method", "seed", "learning_rate", "chosen", "rate_at_end", "error", "run"):
            row[column] = getattr(self, column)
        row |= {"cap": self.max_parameters, "config": self.config or None, "versions": self.versions}
        if self.sizes is not None:
            for column in (*_QUALITIES, "steps", "seconds", "rows_per_second"):
                row[column] = getattr(self, column)
            for column in (*_STORED_SIZES, "total_bytes"):
                row[column] = getattr(self.sizes, column)
        if self.largest_entropies != Entropies():
            row["entropies"] = list(self.largest_entropies.learned)
            row["random_entropies"] = list(self.largest_entropies.random)
        return row

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "TrialResult":
        """The result that a row of a results file holds; it has the entropies of the largest table alone."""
        values = {column: row[column] for column in ("name", "method", "seed", "learning_rate", "error", "run")}
        values |= {"chosen": bool(row["chosen"]), "rate_at_end": bool(row["rate_at_end"])}
        values |= {"max_parameters": row["cap"], "config": json.loads(row["config"] or "{}")}
        values["versions"] = json.loads(row["versions"] or "{}")
        if row["parameters"] is None:
            return cls(**values)
        tables: dict[str, dict[str, int]] = values["config"].get("tables", {})
        largest = max(tables, key=lambda name: tables[name]["num_embeddings"], default="")
        learned, random = tuple(row["entropies"] or ()), tuple(row["random_entropies"] or ())
        values |= {column: math.nan if row[column] is None else row[column] for column in _QUALITIES}
        values |= {column: row[column] for column in ("steps", "seconds", "rows_per_second")}
        sizes = {column: row[column] for column in _STORED_SIZES if row.get(column) is not None}
        values["sizes"] = Sizes(largest_table=largest, **sizes)
        values["entropies"] = {largest: Entropies(learned=learned, random=random)} if learned or random else {}
        return cls(**values)

    def as_outcome(self, run_dir: Path) -> dict[str, Any]:
        """What training came to, as `ended.json` of a run and `report.json` of a comparison hold it."""
        values = asdict(self)
        names = ("method", "name", "max_parameters", "seed", "learning_rate", "validation_bce", "validation_auc")
        return {
            **{name: values[name] for name in names},
            "bce": self.test_bce,
            "auc": self.test_auc,
            **{name: values[name] for name in ("sizes", "entropies", "steps", "rows_per_second", "seconds")},
            "run_dir": str(run_dir),
        }


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a results file holds."""

    trials: tuple[TrialResult, ...]
    """Those with a finite test loss and AUC, in the order of the file."""
    failures: tuple[TrialResult, ...]
    """The others."""

    @property
    def chosen(self) -> list[TrialResult]:
        """The trials at the chosen learning rates: those that count."""
        return [trial for trial in self.trials if trial.chosen]


def read_results(path: Path) -> Results:
    """Read a results file.

    Raises:
        DataFileError: no such file, no Parquet, damaged, or one that lacks a column; the message names all that are
            missing.
    """
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise DataFileError(f"{path}: cannot be read as a results file: {error}") from error
    missing = [column for column in SCHEMA.names if column not in table.column_names]
    if set(missing) - _LATER_COLUMNS:
        raise DataFileError(f"{path}: lacks the columns {', '.join(missing)} of a results file")
    try:
        return results_of(table.select([column for column in SCHEMA.names if column not in missing]).to_pylist())
    except Exception as error:  # whatever damaged bytes lead to, a text that is no JSON or a number that is none
        raise DataFileError(f"{path}: damaged ({type(error).__name__}: {error}); run the comparison again") from error


def results_of(rows: Sequence[Mapping[str, Any]]) -> Results:
    """The results that `rows` hold, which have the columns of a results file."""
    results = [TrialResult.of_row(row) for row in rows]
    return Results(
        trials=tuple(result for result in results if result.failure is None),
        failures=tuple(result for result in results if result.failure is not None),
    )


def write_results(path: Path, results: Sequence[TrialResult], versions: Mapping[str, Any]) -> None:
    """Write a results file, whole or not at all; every row has these `versions`."""
    rows = [result.row() for result in results]
    for row in rows:
        row["config"] = row["config"] and json.dumps(row["config"])
        row["versions"] = json.dumps(versions)
    with atomic_path(path) as temporary:
        pq.write_table(
            pa.Table.from_pylist(rows, schema=SCHEMA), temporary, compression="zstd", write_page_checksum=True
        )


def chosen_results(results: Sequence[TrialResult]) -> list[TrialResult]:
    """The results at the chosen learning rates of all trials that were trained; also of those that diverged."""
    return [result for result in results if result.chosen and result.sizes is not None]


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
