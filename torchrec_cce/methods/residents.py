"""Residents: private rows for a fraction of a CCE table's IDs at a time, folded into its codewords and pointers."""

from dataclasses import dataclass
from typing import Literal, get_args

from torchrec_cce.errors import ConfigError

RowType = Literal["float32", "float16", "int8"]
NO_RESIDENTS = "no table has residents; give its config residents=ResidentConfig(…)"
"""What is said where a phase is to begin."""


@dataclass(frozen=True, kw_only=True)
class ResidentConfig:
    """How many IDs of a table have a private row at a time.

    Raises:
        ConfigError: a fraction that is not above 0 and at most 1, or an unknown dtype.
    """

    fraction: float = 0.25
    """Of all IDs, above 0 and at most 1."""
    shrinkage: float = 0.5
    """What an ID that gets a row again loses of the embedding it has, as a share, 0 to 1."""
    dtype: RowType = "float32"
    """Of the rows. `"float32"`: they are a stock table, which TorchRec places, and any optimizer trains. `"float16"`,
    `"int8"`: they take half or a quarter of the memory, in host memory; every rank has a replica, and row-wise Adagrad
    trains it in the backward pass."""
    learning_rate: float = 0.05
    """`"float16"` and `"int8"`: of that Adagrad."""
    weight_decay: float = 0.0
    """`"float16"` and `"int8"`: what a row loses, as a share of itself and of the learning rate, whenever it is
    trained."""
    first_come: bool = False
    """Whether only IDs that were seen get a row. `admit` then leaves rows free, all of them if no frequencies are
    known, which `top_up` gives to IDs as they arrive. The order in which they came takes 4 bytes a row."""
    newcomers: float = 0.0
    """Of the rows, the share that `admit` leaves free in every phase, below 1: `top_up` gives them to IDs that were
    seen and never had one. In a stream, new IDs then need not wait for the next phase."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"residents: fraction={self.fraction} is not above 0 and at most 1; 0.25 is usual")
        if not 0 <= self.shrinkage <= 1:
            raise ConfigError(f"residents: shrinkage={self.shrinkage} is not in 0..1; 0.5 is usual")
        if self.dtype not in get_args(RowType):
            raise ConfigError(f"residents: dtype={self.dtype!r} is not one of {', '.join(get_args(RowType))}")
        if not self.learning_rate > 0:
            raise ConfigError(f"residents: learning_rate={self.learning_rate} is not above 0")
        if not self.weight_decay >= 0:
            raise ConfigError(f"residents: weight_decay={self.weight_decay} is not at least 0")
        if not 0 <= self.newcomers < 1:
            raise ConfigError(f"residents: newcomers={self.newcomers} is not at least 0 and below 1; 0.1 is usual")

    @property
    def are_topped_up(self) -> bool:
        """Whether IDs get rows in the middle of a phase, and so not in the order of their positions."""
        return self.first_come or self.newcomers > 0

    def num_rows(self, num_embeddings: int) -> int:
        """The rows of a table of `num_embeddings` IDs, at least 1."""
        return max(1, round(self.fraction * num_embeddings))

    def num_admitted(self, num_rows: int) -> int:
        """How many of `num_rows` are given when a phase begins, at least 1; the others are kept for newcomers."""
        return num_rows - min(int(self.newcomers * num_rows), num_rows - 1)
