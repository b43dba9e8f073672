"""Made-up results of trials, and results files of them."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_cce.clustering.entropy import random_entropies
from torchrec_cce.experiments.entropies import largest_table
from torchrec_cce.experiments.results import Entropies, Results, TrialResult, results_of
from torchrec_cce.training.model import Sizes

TABLES = {"item": 100_000, "day": 7}
DIM = 16
FULL_PARAMETERS = (100_000 + 7) * DIM

SIZES = Sizes(
    full_parameters=64_000,
    parameters=1600,
    full_bytes=256_000,
    table_bytes=6400,
    pointer_bytes=16_000,
    largest_table="item",
    largest_factor=40.0,
)

SCHEMA = pa.schema(
    {
        **dict.fromkeys(("name", "method"), pa.string()),
        "cap": pa.int64(),
        "seed": pa.int64(),
        "learning_rate": pa.float64(),
        **dict.fromkeys(("chosen", "rate_at_end"), pa.bool_()),
        **dict.fromkeys(("validation_bce", "validation_auc", "test_bce", "test_auc"), pa.float64()),
        "steps": pa.int64(),
        **dict.fromkeys(("seconds", "rows_per_second"), pa.float64()),
        **dict.fromkeys(("full_parameters", "parameters"), pa.int64()),
        "largest_factor": pa.float64(),
        **dict.fromkeys(
            ("table_bytes", "pointer_bytes", "device_pointer_bytes", "resident_bytes", "training_bytes"), pa.int64()
        ),
        **dict.fromkeys(("total_bytes", "full_bytes"), pa.int64()),
        **dict.fromkeys(("entropies", "random_entropies"), pa.list_(pa.float64())),
        **dict.fromkeys(("error", "run", "config", "versions"), pa.string()),
    }
)


def row(
    method: str,
    *,
    cap: int | None = None,
    seed: int = 0,
    bce: float = 0.5,
    auc: float = 0.7,
    name: str | None = None,
    embedding: Mapping[str, Any] | None = None,
    recluster: Mapping[str, Any] | None = None,
    learned: Sequence[float] | None = None,
    source: str | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """A row of a results file. Sizes follow from method and cap, as if the largest table used all of its cap.

    Args:
        learned: H1 … Hc over those of random pointers.
        source: the run that it starts from.
    """
    name = name or method
    config = {
        "tables": {table: {"num_embeddings": size} for table, size in TABLES.items()},
        "embedding": {"dim": DIM, "method": method, "max_parameters": cap, "num_columns": 4, **(embedding or {})},
        "optimizer": {"embedding_learning_rate": changes.get("learning_rate", 0.05)},
        "recluster": {"ct": 2, "cf": 100, **(recluster or {})},
        "training": {"batch_size": 1024},
        "derive": None if source is None else {"run": source, "circular": False},
        "seed": seed,
    }
    trained = TABLES["item"] * DIM if cap is None else cap
    parameters = trained + TABLES["day"] * DIM
    table = largest_table(config)
    terms = 2 if method.startswith("rq") else 1
    stored = 0 if table is None else table.num_ids * table.num_columns * terms * table.pointer_bits // 8
    on_host = method in ("cce", "pq")
    random = random_entropies(table.num_ids, table.num_rows, table.num_columns) if table is not None else ()
    shares = learned if learned is not None else [0.9] * len(random)
    return {
        "name": name,
        "method": method,
        "cap": cap,
        "seed": seed,
        "learning_rate": 0.05,
        "chosen": True,
        "rate_at_end": False,
        "validation_bce": bce - 0.001,
        "validation_auc": auc + 0.001,
        "test_bce": bce,
        "test_auc": auc,
        "steps": 400,
        "seconds": 3.0,
        "rows_per_second": 1000.0,
        "full_parameters": FULL_PARAMETERS,
        "parameters": parameters,
        "largest_factor": TABLES["item"] * DIM / trained,
        "table_bytes": 4 * parameters,
        "pointer_bytes": stored if on_host else 0,
        "device_pointer_bytes": 0 if on_host else stored,
        "resident_bytes": 0,
        "training_bytes": 5 * parameters + stored,
        "total_bytes": 4 * parameters + stored,
        "full_bytes": 4 * FULL_PARAMETERS,
        "entropies": [share * value for share, value in zip(shares, random, strict=True)],
        "random_entropies": list(random),
        "error": None,
        "run": f"{name}-{cap}-{seed}",
        "config": json.dumps(config),
        "versions": json.dumps({"torch": "2.13.0"}),
        **changes,
    }


def failed(method: str, error: str, **changes: Any) -> dict[str, Any]:
    """A row of a trial that ended in an error before there were sizes."""
    known = {"name", "method", "cap", "seed", "learning_rate", "chosen", "rate_at_end", "run", "config", "versions"}
    made = row(method, **changes)
    return {column: made[column] if column in known else None for column in SCHEMA.names} | {"error": error}


def results(*rows: dict[str, Any]) -> Results:
    return results_of(rows)


def write_results(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), SCHEMA), path)
    return path


def write_metrics(folder: Path, run: str, entropies: Mapping[int, Sequence[float]]) -> None:
    """Metrics of a run: step → entropies of the table `item`."""
    (folder / run).mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = [{"kind": "train", "step": 1, "loss": 0.6}]
    for step, values in entropies.items():
        records.append({"kind": "recluster", "step": step, "table": "day", "entropies": [0.0, 0.0]})
        records.append({"kind": "recluster", "step": step, "table": "item", "entropies": list(values)})
        records.append({"kind": "validation", "step": step, "bce": 0.5, "auc": math.nan})
    (folder / run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def trial_result(folder: Path, method: str, **changes: Any) -> TrialResult:
    """The result of a trial, with metrics on disk in `folder`, as the curves are drawn from them."""
    values: dict[str, Any] = {
        "name": method,
        "method": method,
        "max_parameters": None if method == "full" else 800,
        "seed": 0,
        "learning_rate": 0.05,
        "validation_bce": 0.5,
        "test_bce": 0.51,
        "test_auc": 0.7,
        "sizes": SIZES,
        "entropies": {"item": Entropies(learned=(3.0, 5.5), random=(3.2, 6.0))} if method == "cce" else {},
        "steps": 20,
        "rows_per_second": 1000.0,
        "seconds": 2.0,
        **changes,
    }
    run = f"{method}-{values['max_parameters']}-{values['seed']}"
    (folder / run).mkdir(parents=True, exist_ok=True)
    records = [{"kind": "validation", "step": step, "bce": 0.6 - step / 100} for step in (5, 10)]
    records.insert(1, {"kind": "recluster", "step": 7, "table": "item"})
    (folder / run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return TrialResult(**{"run": run, **values})
