"""Made-up outcomes of runs."""

import json
from pathlib import Path
from typing import Any

from torchrec_cce.experiments.outcome import Entropies, Outcome
from torchrec_cce.training.sizes import Sizes

SIZES = Sizes(
    full_parameters=64_000,
    parameters=1600,
    full_bytes=256_000,
    table_bytes=6400,
    pointer_bytes=16_000,
    largest_table="item",
    largest_factor=40.0,
)


def outcome(folder: Path, method: str, **changes: Any) -> Outcome:
    """An outcome with metrics on disk, as the curves are drawn from them."""
    values: dict[str, Any] = {
        "method": method,
        "max_parameters": None if method == "full" else 800,
        "seed": 0,
        "learning_rate": 0.05,
        "validation_bce": 0.5,
        "bce": 0.51,
        "auc": 0.7,
        "sizes": SIZES,
        "entropies": {"item": Entropies(learned=(3.0, 5.5), random=(3.2, 6.0))} if method == "cce" else {},
        "steps": 20,
        "rows_per_second": 1000.0,
        "seconds": 2.0,
        **changes,
    }
    run_dir = folder / f"{method}-{values['max_parameters']}-{values['seed']}"
    run_dir.mkdir(parents=True, exist_ok=True)
    records = [{"kind": "validation", "step": step, "bce": 0.6 - step / 100} for step in (5, 10)]
    records.insert(1, {"kind": "recluster", "step": 7, "table": "item"})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return Outcome(**values, run_dir=str(run_dir))
