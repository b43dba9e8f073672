"""Hashed tables: the hashing trick, CE concat, CE sum (Bloom embeddings), CE hybrid, and count sketches."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig, EmbeddingConfig

from torchrec_cce.errors import ConfigError
from torchrec_cce.hashing import MAX_ROWS, UniversalHash, derive_seed, term_hash
from torchrec_cce.kernels.rows import hashed_rows
from torchrec_cce.methods.table import CompressedConfig, Looked, MethodSpec, PointerScheme, Sizing, TensorRows, within
from torchrec_cce.methods.tensor_hash import Constant, TensorHash


@dataclass(kw_only=True)
class CompositionalConfig(CompressedConfig):
    """A table whose embeddings are `c` columns, side by side, of `t` summed codewords each, chosen by hashes.

    `c = t = 1` is the hashing trick, `t = 1` CE concat, `c = 1` CE sum (Bloom embeddings), `t = 2` CE hybrid. Codewords
    are initialised uniformly within ±1/√d, as DLRM does, unless `weight_init_min/max` or `init_fn` say otherwise.

    Raises:
        ConfigError: the sizes do not fit together; the message names the nearest that do.
    """

    num_rows: int
    """`k`: rows of each of the `c·t` small tables."""
    num_columns: int = 1
    """`c`: columns, each `embedding_dim / c` wide; 1 to 32, and a divisor of `embedding_dim`."""
    num_terms: int = 1
    """`t`: codewords summed in each column."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_rows <= MAX_ROWS:
            raise ConfigError(f"table {self.name!r}: num_rows={self.num_rows} is not in 1..2^32")
        self._check_positive(num_terms=self.num_terms)
        self._check_columns(self.num_columns)

    def row_feature_names(self) -> list[str]:
        """The features of the physical table: `f#table#j`."""
        return [f"{feature}#{self.name}#{j}" for feature in self.feature_names for j in range(self.num_columns)]

    @property
    def num_codewords(self) -> int:
        """Codewords that are looked up and summed for an ID in each column."""
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

    def scheme(self) -> PointerScheme:
        return HashedScheme(num_ids=self.num_embeddings, terms=self._term_hashes())

    def _term_hashes(self) -> tuple[UniversalHash, ...]:
        seed = derive_seed(self.seed, self.name)
        return tuple(
            term_hash(seed, term, num_columns=self.num_columns, num_rows=self.num_rows)
            for term in range(self.num_terms)
        )

    @abstractmethod
    def physical(self) -> BaseEmbeddingConfig:
        """The stock TorchRec table that is trained: `c·t·k` rows of `d/c` floats, shared by all column features.

        Row `(t·j + p)·k + code` is codeword `code` of term `p` of column `j`.
        """

    def _physical_fields(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "num_embeddings": self.num_physical_rows,
            "embedding_dim": self.embedding_dim // self.num_columns,
            "feature_names": self.row_feature_names(),
            "data_type": self.data_type,
            "weight_init_min": self.weight_init_min,
            "weight_init_max": self.weight_init_max,
            "init_fn": self.init_fn,
        }


@dataclass(kw_only=True)
class CompositionalEmbeddingBagConfig(CompositionalConfig, EmbeddingBagConfig):
    """A hashed table whose IDs come in bags that are pooled. Sizes and errors: `CompositionalConfig`."""

    signed: bool = False
    """Multiply each codeword of an ID by +1 or -1, chosen by another hash: a count sketch (Charikar et al. 2002)."""

    def scheme(self) -> PointerScheme:
        if not self.signed:
            return super().scheme()
        seed = derive_seed(derive_seed(self.seed, self.name), "signs")
        sign_hash = UniversalHash.from_seed(seed, num_columns=self.num_columns * self.num_terms, num_rows=2)
        return SignedScheme(num_ids=self.num_embeddings, terms=self._term_hashes(), sign_hash=sign_hash)

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
            f"table {table.name!r}: signed=True is for CompositionalEmbeddingBagConfig, whose codewords are hashed; "
            f"this is a {type(table).__name__}"
        )


def first_rows(num_columns: int, num_terms: int, num_rows: int) -> Constant:
    """[c, 1, t] int64: the row of code 0 of each term of each column, of `num_rows` codes each."""
    terms = torch.from_numpy(np.arange(num_columns * num_terms, dtype=np.int64) * num_rows)
    return Constant(terms.view(num_columns, 1, num_terms))


@dataclass(frozen=True, kw_only=True)
class HashedScheme:
    """Every codeword is chosen by a hash of the ID."""

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

    def on_tensors(self) -> Callable[[torch.Tensor], TensorRows]:
        hashes = [TensorHash(term) for term in self.terms]
        starts = first_rows(self.num_columns, self.num_terms, self.terms[0].num_rows)

        def found(ids: torch.Tensor) -> TensorRows:
            codes = torch.stack([function(ids) for function in hashes], dim=2)  # [N, c, t]
            known = None if self.num_ids is None else within(ids, self.num_ids)
            return TensorRows(codes.transpose(0, 1) + starts.on(ids.device), known=known)

        return found


@dataclass(frozen=True, kw_only=True)
class SignedScheme(HashedScheme):
    """A count sketch: hashed codewords, each times +1 or -1."""

    sign_hash: UniversalHash
    """`c·t` functions onto 2, term fastest."""

    def signs(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Of the codewords of `ids: [N]`: [c, N, t] float32, each 1 or -1."""
        bits = self.sign_hash.numpy(ids).reshape(len(ids), self.num_columns, self.num_terms)
        signs: npt.NDArray[np.float32] = (2 * bits - 1).transpose(1, 0, 2).astype(np.float32)
        return signs

    def on_tensors(self) -> Callable[[torch.Tensor], TensorRows]:
        unsigned, sign_hash = super().on_tensors(), TensorHash(self.sign_hash)

        def found(ids: torch.Tensor) -> TensorRows:
            bits = sign_hash(ids).unflatten(1, (self.num_columns, self.num_terms))
            return unsigned(ids)._replace(signs=(2 * bits - 1).transpose(0, 1).to(torch.float32))

        return found


def _hashed(sizing: Sizing, *, num_columns: int, num_terms: int = 1, signed: bool = False) -> EmbeddingBagConfig:
    return sizing.make(
        CompositionalEmbeddingBagConfig,
        num_rows=sizing.rows(num_terms * sizing.table.embedding_dim),
        num_columns=num_columns,
        num_terms=num_terms,
        signed=signed,
    )


_HASHING = "hashing"
METHODS = (
    MethodSpec(name="hashing_trick", family=_HASHING, size=lambda sizing: _hashed(sizing, num_columns=1)),
    MethodSpec(
        name="ce_sum",
        family=_HASHING,
        size=lambda sizing: _hashed(sizing, num_columns=1, num_terms=sizing.terms(usual=2)),
    ),
    MethodSpec(name="ce_concat", family=_HASHING, size=lambda sizing: _hashed(sizing, num_columns=sizing.num_columns)),
    MethodSpec(
        name="ce_hybrid",
        family=_HASHING,
        size=lambda sizing: _hashed(sizing, num_columns=sizing.num_columns, num_terms=2),
    ),
    MethodSpec(
        name="count_sketch",
        family=_HASHING,
        size=lambda sizing: _hashed(sizing, num_columns=sizing.num_columns, signed=True),
    ),
)
