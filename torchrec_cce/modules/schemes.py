"""Pointer schemes: how each method turns a raw ID into rows of its physical table.

A method of the paper that is "pointers into a small table" is one class here and nothing else: the remap, the trained
`EmbeddingBagCollection` and the combination of columns are the same for all.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_cce.config import CCEEmbeddingBagConfig, CompositionalEmbeddingBagConfig
from torchrec_cce.hashing import UniversalHash, derive_seed, term_hash
from torchrec_cce.kernels.rows import clustered_rows, hashed_rows, identity_rows
from torchrec_cce.maps.pointer_map import PointerMap


class PointerScheme(Protocol):
    """`c` columns of `t` terms: the rows of the physical table whose words make up an ID's embedding."""

    @property
    def num_columns(self) -> int: ...

    @property
    def num_terms(self) -> int: ...

    def rows_into(self, ids: npt.NDArray[np.int64], out: npt.NDArray[np.int64]) -> int:
        """Write the rows of `ids: [N] int64` to `out: [c, N, t] int64`.

        Returns the position of the first ID outside the table's universe, or -1; then `out` holds no row to be used.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class FullScheme:
    """A full table: the ID is the row."""

    num_ids: int
    num_columns: int = 1
    num_terms: int = 1

    def rows_into(self, ids: npt.NDArray[np.int64], out: npt.NDArray[np.int64]) -> int:
        return identity_rows(ids, self.num_ids, out)


@dataclass(frozen=True, kw_only=True)
class HashedScheme:
    """Hashing trick, CE concat, CE sum and CE hybrid: every word is chosen by a hash of the ID."""

    num_ids: int
    terms: tuple[UniversalHash, ...]
    """`t` times `c` functions onto `k` rows."""

    @property
    def num_columns(self) -> int:
        return self.terms[0].num_columns

    @property
    def num_terms(self) -> int:
        return len(self.terms)

    @cached_property
    def _multipliers(self) -> npt.NDArray[np.uint64]:
        return np.stack([term.multipliers for term in self.terms], axis=1).reshape(-1)

    @cached_property
    def _offsets(self) -> npt.NDArray[np.uint64]:
        return np.stack([term.offsets for term in self.terms], axis=1).reshape(-1)

    def rows_into(self, ids: npt.NDArray[np.int64], out: npt.NDArray[np.int64]) -> int:
        return hashed_rows(ids, self.num_ids, self._multipliers, self._offsets, self.terms[0].num_rows, out)


@dataclass(frozen=True, kw_only=True)
class CCEScheme:
    """CCE: the codebook word by the map's pointers (before the first clustering, a hash), the helper word by a hash."""

    pointer_map: PointerMap
    num_terms: int = 2

    @property
    def num_columns(self) -> int:
        return self.pointer_map.num_columns

    @cached_property
    def _unclustered(self) -> HashedScheme:
        terms = (self.pointer_map.codebook_hash, self.pointer_map.helper_hash)
        return HashedScheme(num_ids=self.pointer_map.num_ids, terms=terms)

    def rows_into(self, ids: npt.NDArray[np.int64], out: npt.NDArray[np.int64]) -> int:
        if self.pointer_map.stored is None:
            return self._unclustered.rows_into(ids, out)
        helper = self.pointer_map.helper_hash
        return clustered_rows(
            ids, self.pointer_map.stored_view, helper.multipliers, helper.offsets, helper.num_rows, out
        )


def scheme_of(config: EmbeddingBagConfig) -> PointerScheme:
    """The scheme that a table starts with."""
    if not isinstance(config, CompositionalEmbeddingBagConfig):
        return FullScheme(num_ids=config.num_embeddings)
    seed = derive_seed(config.seed, config.name)
    sizes = {"num_columns": config.num_columns, "num_rows": config.num_rows}
    if isinstance(config, CCEEmbeddingBagConfig):
        return CCEScheme(pointer_map=PointerMap.hashed(num_ids=config.num_embeddings, seed=seed, **sizes))
    terms = tuple(term_hash(seed, term, **sizes) for term in range(config.num_terms))
    return HashedScheme(num_ids=config.num_embeddings, terms=terms)
