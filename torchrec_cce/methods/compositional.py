"""Table configurations: what a user writes instead of `torchrec.EmbeddingBagConfig` and `torchrec.EmbeddingConfig`.

They are dataclasses like TorchRec's own (and therefore not frozen), keyword-only in what they add, and checked where
they are built.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig, EmbeddingConfig

from torchrec_cce.errors import ConfigError
from torchrec_cce.hashing import MAX_ROWS, UniversalHash
from torchrec_cce.kernels.rows import hashed_rows
from torchrec_cce.methods.scheme import Looked
from torchrec_cce.methods.table import check_columns, prepare_table


@dataclass(kw_only=True)
class CompositionalConfig(BaseEmbeddingConfig, ABC):
    """A table of `num_embeddings` raw IDs, each the concatenation of `c` columns of `t` summed words chosen by hashes.

    `c = t = 1` is the hashing trick, `t = 1` CE concat, `c = 1` CE sum (Bloom embeddings), `t = 2` CE hybrid. Words are
    initialised uniformly within ±1/√d, as DLRM does, unless `weight_init_min/max` or `init_fn` say otherwise.

    Raises:
        ConfigError: the sizes do not fit together; the message names the nearest that do.
    """

    num_rows: int
    """`k`: rows of each of the `c·t` small tables."""
    num_columns: int = 1
    """`c`: columns, each `embedding_dim / c` wide; 1 to 32, and a divisor of `embedding_dim`."""
    num_terms: int = 1
    """`t`: words summed in each column."""
    seed: int = 0
    """Of the hash functions. Tables of different names get different functions from one seed."""

    def __post_init__(self) -> None:
        prepare_table(self)
        if not 1 <= self.num_rows <= MAX_ROWS:
            raise ConfigError(f"table {self.name!r}: num_rows={self.num_rows} is not in 1..2^32")
        if self.num_terms < 1:
            raise ConfigError(f"table {self.name!r}: num_terms={self.num_terms} must be at least 1")
        check_columns(self, self.num_columns)
        super().__post_init__()

    def column_feature_names(self) -> list[str]:
        """The features of the physical table: `f#table#j`, the columns of a feature side by side."""
        return [f"{feature}#{self.name}#{j}" for feature in self.feature_names for j in range(self.num_columns)]

    @property
    def num_words(self) -> int:
        """Words that are looked up and summed for an ID in each column."""
        return self.num_terms

    @property
    def num_physical_rows(self) -> int:
        """Rows, `d/c` wide, of the table that is trained."""
        return self.num_columns * self.num_terms * self.num_rows

    @property
    def num_physical_parameters(self) -> int:
        """Values in that table."""
        return int(self.num_physical_rows * self.embedding_dim // self.num_columns)

    @property
    def num_parameters(self) -> int:
        """Those of them that are trained."""
        return self.num_physical_parameters

    @abstractmethod
    def physical(self) -> BaseEmbeddingConfig:
        """The stock TorchRec table that is trained: `c·t·k` rows of `d/c` floats, shared by all column features.

        Row `(t·j + p)·k + code` is word `code` of term `p` of column `j`.
        """

    def _physical_fields(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "num_embeddings": self.num_physical_rows,
            "embedding_dim": self.embedding_dim // self.num_columns,
            "feature_names": self.column_feature_names(),
            "data_type": self.data_type,
            "weight_init_min": self.weight_init_min,
            "weight_init_max": self.weight_init_max,
            "init_fn": self.init_fn,
        }


@dataclass(kw_only=True)
class CompositionalEmbeddingBagConfig(CompositionalConfig, EmbeddingBagConfig):
    """A hashed table whose IDs come in bags that are pooled. Sizes and errors: `CompositionalConfig`."""

    signed: bool = False
    """Multiply each word of an ID by +1 or -1, chosen by another hash: a count sketch (Charikar et al. 2002)."""

    def physical(self) -> EmbeddingBagConfig:
        return EmbeddingBagConfig(**self._physical_fields(), pooling=self.pooling)


@dataclass(kw_only=True)
class CompositionalEmbeddingConfig(CompositionalConfig, EmbeddingConfig):
    """A hashed table that gives every ID of a sequence an embedding. Sizes and errors: `CompositionalConfig`."""

    def physical(self) -> EmbeddingConfig:
        return EmbeddingConfig(**self._physical_fields())


def refuse_signs(table: CompositionalEmbeddingBagConfig) -> None:
    if table.signed:
        raise ConfigError(
            f"table {table.name!r}: signed=True is for CompositionalEmbeddingBagConfig, whose words are hashed; this "
            f"is a {type(table).__name__}"
        )


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
