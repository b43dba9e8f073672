"""What a version holds of one CCE table: its map together with the words that the map points at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from torchrec_cce.errors import ConfigError
from torchrec_cce.maps.pointer_map import PointerMap


@dataclass(frozen=True, kw_only=True, eq=False)
class TableSnapshot:
    """One table at one moment. The arrays may be memory-mapped, and are not to be written."""

    pointer_map: PointerMap
    num_embeddings: int
    """Raw IDs that the table has room for: the map's rows, or more if it has a vocabulary."""
    embedding_dim: int
    feature_names: Sequence[str]
    pooling: Literal["sum", "mean"]
    weights: npt.NDArray[np.float32] | None = None
    """[2·c·k, d/c] float32, the physical table: row `(2j + p)·k + code` is word `code` of column `j`, of the codebook
    (p = 0) or the helper table (p = 1). None where they are kept elsewhere, as in a training checkpoint."""
    frequencies: npt.NDArray[np.int64] | None = None
    """[n] int64, how often the raw ID of each row was seen; None if it was not counted."""
    entropies: tuple[float, ...] = ()
    """`H1 … Hc` of the pointers in nats; empty if not computed."""
    objective: float | None = None
    """Of the clustering that made the map: mean over IDs of the squared distance to the new codebook words."""

    def __post_init__(self) -> None:
        c, k = self.pointer_map.num_columns, self.pointer_map.num_rows
        shape = (2 * c * k, self.embedding_dim // c)
        if self.weights is not None and (self.weights.shape != shape or self.weights.dtype != np.float32):
            raise ConfigError(f"weights are {self.weights.dtype} {list(self.weights.shape)}, not float32 {list(shape)}")
        n = self.pointer_map.num_ids
        if self.frequencies is not None and (self.frequencies.shape != (n,) or self.frequencies.dtype != np.int64):
            raise ConfigError(
                f"frequencies are {self.frequencies.dtype} {list(self.frequencies.shape)}, not int64 [{n}], one a row"
            )


class MapHolder(Protocol):
    """A module that has CCE tables, such as `CCEEmbeddingBagCollection`."""

    def restore(self, tables: Mapping[str, TableSnapshot]) -> None:
        """Take over maps and weights of all its CCE tables, or raise and change nothing."""
        ...
