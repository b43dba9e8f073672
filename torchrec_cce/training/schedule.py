"""When tables are clustered and when training ends."""

import math
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """`ct` clusterings, `cf` batches apart, then `rest` batches (Appendix E)."""

    ct: int
    cf: int
    rest: int | None

    def clusters_after(self, step: int) -> bool:
        """Whether a clustering follows batch `step`, counted from 1."""
        return self.ct > 0 and step % self.cf == 0 and step // self.cf <= self.ct

    def resting_after(self, step: int) -> bool:
        """Whether no clustering comes any more."""
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
