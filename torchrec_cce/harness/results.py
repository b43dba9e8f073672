"""The results file of a comparison: one row a trial. Its columns are described in docs/benchmarking.md."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_cce.atomic import atomic_path
from torchrec_cce.evaluation.compression import Sizes
from torchrec_cce.evaluation.outcome import Entropies, Outcome
from torchrec_cce.evaluation.results import SCHEMA, Result, read_results
from torchrec_cce.harness.agenda import Record


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
