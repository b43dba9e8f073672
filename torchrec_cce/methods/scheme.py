"""Pointer schemes: how each method turns a raw ID into rows of its physical table.

A method of the paper that is "pointers into a small table" is one class here and nothing else: the remap, the trained
collection and the combination of columns are the same for all.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from torchrec_cce.kernels.rows import identity_rows


class PointerScheme(Protocol):
    """`c` columns of `t` terms: the rows of the physical table whose words make up an ID's embedding."""

    @property
    def num_columns(self) -> int: ...

    @property
    def num_terms(self) -> int: ...

    def rows_into(self, ids: npt.NDArray[np.int64], out: npt.NDArray[np.int64]) -> "Looked":
        """Write the rows of `ids: [N] int64` to `out: [c, N, t] int64`."""
        ...


class Looked(NamedTuple):
    """What `rows_into` found."""

    bad: int = -1
    """Position of the first ID that the table cannot hold, or -1. If there is one, no row in `out` may be used."""
    unseen: int = 0
    """IDs that the map does not know and that got what its policy for them says."""


@dataclass(frozen=True, kw_only=True)
class FullScheme:
    """A full table: the ID is the row."""

    num_ids: int
    num_columns: int = 1
    num_terms: int = 1

    def rows_into(self, ids: npt.NDArray[np.int64], out: npt.NDArray[np.int64]) -> Looked:
        return Looked(bad=identity_rows(ids, self.num_ids, out))
