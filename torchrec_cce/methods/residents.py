"""Residents: private rows for a fraction of a CCE table's IDs at a time, folded into its codewords and pointers."""

from dataclasses import dataclass

from torchrec.modules.embedding_configs import DataType

from torchrec_cce.errors import ConfigError

_DATA_TYPES = {"float32": DataType.FP32}


@dataclass(frozen=True, kw_only=True)
class ResidentConfig:
    """How many IDs of a table have a private row at a time.

    Raises:
        ConfigError: a fraction that is not above 0 and at most 1, or an unknown dtype.
    """

    fraction: float = 0.25
    """Of all IDs, above 0 and at most 1."""
    dtype: str = "float32"
    """Of the rows."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"residents: fraction={self.fraction} is not above 0 and at most 1; 0.25 is usual")
        if self.dtype not in _DATA_TYPES:
            raise ConfigError(f"residents: dtype={self.dtype!r} is not one of {', '.join(_DATA_TYPES)}")

    @property
    def data_type(self) -> DataType:
        return _DATA_TYPES[self.dtype]

    def num_rows(self, num_embeddings: int) -> int:
        """The rows of a table of `num_embeddings` IDs, at least 1."""
        return max(1, round(self.fraction * num_embeddings))
