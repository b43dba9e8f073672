"""Small plans for tests."""

from pathlib import Path
from typing import Any

from tests.support import runs
from torchrec_cce.experiments.plan import Plan, parse_plan


def values(log: Path, *methods: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Of a plan on `tests.support.runs.write_criteo_log`, as a TOML file would give them."""
    run = runs.criteo_config(log, embedding={"method": "full", "max_parameters": None}).as_dict()
    shared = {name: run[name] for name in ("data", "tables", "model", "recluster", "training")}
    return {
        "seeds": [7, 8],
        "caps": [runs.MAX_PARAMETERS],
        "learning_rates": [0.1, 0.2],
        "methods": list(methods) or [{"method": "full"}, {"method": "cce"}],
        "run": {**shared, **changes.pop("run", {})},
        **changes,
    }


def plan(log: Path, *methods: dict[str, Any], **changes: Any) -> Plan:
    return parse_plan(values(log, *methods, **changes))
