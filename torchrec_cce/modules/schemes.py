"""Pointer schemes: how each method turns a raw ID into rows of its physical table.

A method of the paper that is "pointers into a small table" is one class here and nothing else: the remap, the trained
collection and the combination of columns are the same for all.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_cce.config import (
    CCEConfig,
    CompositionalConfig,
    CompositionalEmbeddingBagConfig,
    QuotientRemainderEmbeddingBagConfig,
)
from torchrec_cce.hashing import UniversalHash, derive_seed, term_hash
from torchrec_cce.kernels.rows import clustered_rows, hashed_rows, identity_rows, partly_clustered_rows
from torchrec_cce.maps.pointer_map import PointerMap


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


@dataclass(frozen=True, kw_only=True)
class HashedScheme:
    """Hashing trick, CE concat, CE sum and CE hybrid: every word is chosen by a hash of the ID."""

    num_ids: int | None
    """None: any 64-bit ID."""
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

    def rows_into(self, ids: npt.NDArray[np.int64], out: npt.NDArray[np.int64]) -> Looked:
        bad = hashed_rows(ids, self.num_ids or 0, self._multipliers, self._offsets, self.terms[0].num_rows, out)
        return Looked(bad=-1 if self.num_ids is None else bad)


@dataclass(frozen=True, kw_only=True)
class SignedScheme(HashedScheme):
    """A count sketch: hashed words, each times +1 or -1."""

    sign_hash: UniversalHash
    """`c·t` functions onto 2, term fastest."""

    def signs(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Of the words of `ids: [N]`: [c, N, t] float32, each 1 or -1."""
        bits = self.sign_hash.numpy(ids).reshape(len(ids), self.num_columns, self.num_terms)
        signs: npt.NDArray[np.float32] = (2 * bits - 1).transpose(1, 0, 2).astype(np.float32)
        return signs


@dataclass(frozen=True, kw_only=True)
class QuotientRemainderScheme:
    """One word by `id % m`, one by `id // m`, whose rows come after the `m` of the first."""

    num_ids: int
    num_remainders: int
    """`m`."""
    num_columns: int
    num_terms: int
    """One of the two is 2, the other 1: words are concatenated or summed."""

    def rows_into(self, ids: npt.NDArray[np.int64], out: npt.NDArray[np.int64]) -> Looked:
        quotients, remainders = np.divmod(ids, self.num_remainders)
        words = out[0] if self.num_columns == 1 else out[:, :, 0].T  # [N, 2], a view
        words[:, 0] = remainders
        words[:, 1] = self.num_remainders + quotients
        bad = np.flatnonzero((ids < 0) | (ids >= self.num_ids))
        return Looked(bad=int(bad[0]) if len(bad) else -1)


@dataclass(frozen=True, kw_only=True)
class CCEScheme:
    """CCE: the codebook word by the map's pointers (before the first clustering, a hash), the helper word by a hash."""

    pointer_map: PointerMap
    use_helper: bool = True
    """False: codebook words alone, of a physical table that has its helper rows all the same."""

    @property
    def num_terms(self) -> int:
        return 2 if self.use_helper else 1

    @property
    def num_columns(self) -> int:
        return self.pointer_map.num_columns

    @cached_property
    def _unclustered(self) -> HashedScheme:
        terms = (self.pointer_map.codebook_hash, self.pointer_map.helper_hash)
        # The map says which IDs it knows, where they are not simply all below a bound.
        num_ids = None if self.pointer_map.takes_any_id else self.pointer_map.num_ids
        return HashedScheme(num_ids=num_ids, terms=terms)

    def rows_into(self, ids: npt.NDArray[np.int64], out: npt.NDArray[np.int64]) -> Looked:
        one = self.pointer_map
        # Where every ID is its own row, and any other is an error, one pass does it all.
        if not one.takes_any_id and one.stored is None and self.use_helper:
            return self._unclustered.rows_into(ids, out)
        helper = one.helper_hash
        if not one.takes_any_id and one.stored is not None:
            bad = clustered_rows(ids, one.stored_view, helper.multipliers, helper.offsets, helper.num_rows, out)
            return Looked(bad=bad)

        ids, map_rows, unseen = one.resolve(ids)
        if unseen is not None and one.unseen == "error":
            return Looked(bad=int(np.argmax(unseen)))
        if one.stored is None and self.use_helper:
            self._unclustered.rows_into(ids, out)
        else:
            codebook = one.codebook_hash
            none_stored = np.empty((0, one.num_columns), np.uint8)
            partly_clustered_rows(
                ids,
                map_rows,
                none_stored if one.stored is None else one.stored_view,
                codebook.multipliers,
                codebook.offsets,
                helper.multipliers,
                helper.offsets,
                helper.num_rows,
                out,
            )
        return Looked(unseen=0 if unseen is None else int(np.count_nonzero(unseen)))


def scheme_of(config: BaseEmbeddingConfig) -> PointerScheme:
    """The scheme that a table starts with."""
    if not isinstance(config, CompositionalConfig):  # a full table, or a computed one, which takes the IDs themselves
        return FullScheme(num_ids=config.num_embeddings)
    seed = derive_seed(config.seed, config.name)
    c, k = config.num_columns, config.num_rows
    if isinstance(config, CCEConfig):
        start = PointerMap.hashed(num_ids=config.num_embeddings, num_columns=c, num_rows=k, seed=seed)
        return CCEScheme(pointer_map=start, use_helper=config.use_helper)
    t = config.num_terms
    if isinstance(config, QuotientRemainderEmbeddingBagConfig):
        return QuotientRemainderScheme(num_ids=config.num_embeddings, num_remainders=k, num_columns=c, num_terms=t)
    terms = tuple(term_hash(seed, term, num_columns=c, num_rows=k) for term in range(t))
    if isinstance(config, CompositionalEmbeddingBagConfig) and config.signed:
        sign_hash = UniversalHash.from_seed(derive_seed(seed, "signs"), num_columns=c * t, num_rows=2)
        return SignedScheme(num_ids=config.num_embeddings, terms=terms, sign_hash=sign_hash)
    return HashedScheme(num_ids=config.num_embeddings, terms=terms)
