"""What the reclustering job came to: for people, for schedulers, and for the same job when it is started again."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass

from torchrec_cce.files.atomic import write_json
from torchrec_cce.jobs.recluster.gates import Gate, TableFigures
from torchrec_cce.training.metrics import Quality

RECORD = "recluster.json"
"""In the output folder: what made it."""

Status = Literal["published", "finished", "refused", "there already"]
"""A new version is current; the version was, and its checkpoint has been written now; gates were closed; nothing was to
do."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a job did."""

    status: Status
    checkpoint: str
    output: str
    registry: str
    parent: int
    version: int | None
    """None if it was refused."""
    forced: bool
    """Whether it was published although gates were closed."""
    identity: dict[str, Any]
    """All that decides the result."""
    tables: tuple[TableFigures, ...]
    gates: tuple[Gate, ...]
    before: Quality | None
    """Of the validation sample."""
    after: Quality | None
    seconds: dict[str, float]
    """Step of the job → how long it took."""

    @property
    def closed(self) -> list[Gate]:
        """The gates that were not passed."""
        return [gate for gate in self.gates if not gate.passed]

    def to_json(self) -> str:
        """One line. Numbers that are not finite are null."""
        return _ADAPTER.dump_json(self).decode()


_ADAPTER = TypeAdapter(Outcome)


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Note in `folder` what made it."""
    write_json(folder / RECORD, outcome)


def read_outcome(folder: Path) -> Outcome | None:
    """What made `folder`; None if it was not this job."""
    try:
        return _ADAPTER.validate_python(json.loads((folder / RECORD).read_text()))
    except (OSError, ValueError):
        return None
