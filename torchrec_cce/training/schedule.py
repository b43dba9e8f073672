"""When tables are clustered and when training ends."""

import math
from dataclasses import dataclass, field

from pydantic import TypeAdapter, ValidationError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """`ct` clusterings, `cf` batches apart, then `rest` batches (Appendix E)."""

    ct: int
    cf: int
    rest: int | None

    def clusters_after(self, step: int) -> bool:
        """Whether a clustering follows batch `step`, counted from 1."""
        return self.ct > 0 and step % self.cf == 0 and step // self.cf <= self.ct

    def tops_up_before(self, step: int) -> bool:
        """Whether the free rows of a phase go to IDs that were seen, those of batch `step` among them, before it is
        trained on: at the first batches of a phase, and then four times while their number doubles."""
        if step > self.ct * self.cf:
            return False
        batch = (step - 1) % self.cf + 1
        low_bits = max(0, batch.bit_length() - 3)
        return batch >> low_bits << low_bits == batch

    def resting_after(self, step: int) -> bool:
        """Whether all clusterings are over."""
        return step >= self.ct * self.cf

    def ends_after(self, step: int) -> bool:
        return self.rest is not None and step >= self.ct * self.cf + self.rest


@dataclass(kw_only=True)
class EarlyStopping:
    """The paper's rule: stop when the best validation BCE of an epoch is not below that of the epoch before."""

    epochs: list[float] = field(default_factory=list)
    """Epoch → its best BCE so far; infinite where none was measured."""

    def record(self, epoch: int, bce: float) -> bool:
        """Note an evaluation in `epoch` (from 0). Returns whether it is the best of all."""
        improved = bce < min(self.epochs, default=math.inf)
        self.epochs += [math.inf] * (epoch + 1 - len(self.epochs))
        self.epochs[epoch] = min(bce, self.epochs[epoch])
        return improved

    def stops_after(self, epoch: int) -> bool:
        """Whether to stop now that `epoch` is over."""
        measured = 1 <= epoch < len(self.epochs) and math.isfinite(self.epochs[epoch])
        return measured and self.epochs[epoch] >= self.epochs[epoch - 1]


@dataclass(kw_only=True)
class Position:
    """Where a run is; the same on every rank. A run that goes on from here measures what an uninterrupted run would."""

    step: int = 0
    """Batches trained."""
    epoch: int = 0
    batch: int = 0
    """Batches of the current epoch trained."""
    best: dict[str, int | float] | None = None
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
    """The registry's newest version that the run knows of, if it watches: see `VersionWatcher.version`."""

    @classmethod
    def from_json(cls, text: str | bytes) -> "Position":
        """Raises ValueError, in one line, if it is not what a run has written."""
        try:
            return _POSITION.validate_json(text, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'position'}: {first['msg']}") from error


_POSITION = TypeAdapter(Position)
