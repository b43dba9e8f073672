"""How far a run has come: what a checkpoint holds beside weights, optimizer state and maps."""

import json
from dataclasses import asdict, dataclass, field

from torchrec_cce.training.schedule import EarlyStopping


@dataclass(kw_only=True)
class Position:
    """The same on every rank. A run that goes on from it measures the same as one that was never interrupted."""

    step: int = 0
    """Batches trained."""
    epoch: int = 0
    batch: int = 0
    """Batches of the current epoch trained."""
    best: dict[str, float] | None = None
    """The evaluation with the lowest validation BCE, and the test split at that moment."""
    stopping: EarlyStopping = field(default_factory=EarlyStopping)
    validated: int = -1
    """Step of the last evaluation."""
    entropies: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """CCE table → `H1 … Hc` after its last clustering."""
    loss: tuple[float, ...] = (0.0, 0.0)
    """Sum of the training losses since the last record, and the number of rows."""
    metrics_bytes: int = 0
    """Size of `metrics.jsonl`."""
    version: int | None = None
    """The registry's newest version that the run knows of, if it watches it: see `VersionWatcher.version`."""

    @classmethod
    def from_json(cls, text: str) -> "Position":
        values = json.loads(text)
        return cls(
            **values
            | {
                "stopping": EarlyStopping(**values["stopping"]),
                "entropies": {table: tuple(each) for table, each in values["entropies"].items()},
                "loss": tuple(values["loss"]),
            }
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self))
