"""What a version holds of one CCE table, the map and the codewords that it points at, and how much two maps differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from torchrec_cce.errors import ConfigError
from torchrec_cce.maps.pointer_map import PointerMap

_CHUNK = 65536


@dataclass(frozen=True, kw_only=True, eq=False)
class TableSnapshot:
    """One table at one moment. The arrays may be memory-mapped, and are not to be written."""

    pointer_map: PointerMap
    num_embeddings: int
    """Raw IDs that the table has room for: as many as the map has, or more if it has a vocabulary."""
    embedding_dim: int
    feature_names: Sequence[str]
    pooling: Literal["sum", "mean"]
    weights: npt.NDArray[np.float32] | None = None
    """[2·c·k, d/c] float32, the physical table: row `(2j + p)·k + code` is codeword `code` of column `j`, of the
    codebook (p = 0) or the helper table (p = 1). None where they are kept elsewhere, as in a training checkpoint."""
    frequencies: npt.NDArray[np.int64] | None = None
    """[n] int64, how often the raw ID of each position was seen; None if it was not counted."""
    entropies: tuple[float, ...] = ()
    """`H1 … Hc` of the pointers in nats; empty if not computed."""
    objective: float | None = None
    """Of the clustering that made the map: mean over IDs of the squared distance to the new codewords."""

    def __post_init__(self) -> None:
        c, k = self.pointer_map.num_columns, self.pointer_map.num_rows
        shape = (2 * c * k, self.embedding_dim // c)
        if self.weights is not None and (self.weights.shape != shape or self.weights.dtype != np.float32):
            raise ConfigError(f"weights are {self.weights.dtype} {list(self.weights.shape)}, not float32 {list(shape)}")
        n = self.pointer_map.num_ids
        if self.frequencies is not None and (self.frequencies.shape != (n,) or self.frequencies.dtype != np.int64):
            found = f"{self.frequencies.dtype} {list(self.frequencies.shape)}"
            raise ConfigError(f"frequencies are {found}, not int64 [{n}], one a raw ID")


class MapHolder(Protocol):
    """A module that has CCE tables, such as `CCEEmbeddingBagCollection`."""

    def restore(self, tables: Mapping[str, TableSnapshot]) -> None:
        """Take over maps and weights of all its CCE tables, or raise and change nothing."""
        ...


@dataclass(frozen=True, kw_only=True)
class Churn:
    """From an old map of a table to a new one."""

    share_changed: float
    """Of the codebook pointers of the raw IDs that both have, 0 to 1; 0 where they have none in common."""
    num_common: int
    """Raw IDs that both have."""
    num_added: int
    """Raw IDs that only the new map has."""
    num_removed: int
    """Raw IDs that only the old map has."""


def churn(old: TableSnapshot | None, new: TableSnapshot | None) -> Churn | None:
    """Compare the maps of a table raw ID by raw ID, in bounded memory if they have no vocabulary.

    Returns None where they cannot be compared: one is missing, or they have different numbers of columns.
    """
    if old is None or new is None or old.pointer_map.num_columns != new.pointer_map.num_columns:
        return None
    before, after = old.pointer_map, new.pointer_map
    num_common = num_changed = 0
    for start in range(0, after.num_ids, _CHUNK):
        positions = np.arange(start, min(start + _CHUNK, after.num_ids))
        old_positions = before.positions(after.raw_ids(positions))
        both = old_positions >= 0
        num_common += int(np.count_nonzero(both))
        differ = before.codebook_codes(old_positions[both]) != after.codebook_codes(positions[both])
        num_changed += int(np.count_nonzero(differ))
    return Churn(
        share_changed=num_changed / max(1, num_common * after.num_columns),
        num_common=num_common,
        num_added=after.num_ids - num_common,
        num_removed=before.num_ids - num_common,
    )
