"""JSON that every reader takes: numbers that are not finite are null."""

from pathlib import Path
from typing import Any

import pydantic_core

from torchrec_cce.atomic import atomic_path


def write_json(path: Path, values: Any) -> None:
    """Write plain values and dataclasses; the file appears whole."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(pydantic_core.to_json(values, indent=2, inf_nan_mode="null"))
