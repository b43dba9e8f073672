"""Table configurations: what a user writes instead of `torchrec.EmbeddingBagConfig` and `torchrec.EmbeddingConfig`.

They are dataclasses like TorchRec's own (and therefore not frozen), keyword-only in what they add, and checked where
they are built.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig, EmbeddingConfig

from torchrec_cce.errors import ConfigError
from torchrec_cce.hashing import MAX_ROWS

MAX_COLUMNS = 32


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
class CCEConfig(CompositionalConfig):
    """A Clustered Compositional Embedding table: in each column a codebook word, learned by clustering, plus a helper
    word, hashed (Tsang and Ahle, NeurIPS 2023). Trained parameters: `2·k·d`, or `k·d` without helper.
    """

    num_columns: int = 4
    num_terms: int = 2
    """Always 2: codebook and helper."""
    use_helper: bool = True
    """False: an ID reads its codebook words alone. The physical table has its helper rows all the same, as zeros, so
    that maps, versions and placements are those of a table with helper."""

    def __post_init__(self) -> None:
        if self.num_terms != 2:
            raise ConfigError(
                f"table {self.name!r}: num_terms={self.num_terms}; a CCE table has 2, codebook and helper"
            )
        super().__post_init__()

    @property
    def num_words(self) -> int:
        return 2 if self.use_helper else 1

    @property
    def num_parameters(self) -> int:
        return int(self.num_words * self.num_rows * self.embedding_dim)

    def used_words(self, weights: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """`weights: [2·c·k, d/c]`, with zeros for a helper that is not used."""
        if self.use_helper:
            return weights
        used: npt.NDArray[np.float32] = weights.copy()
        used.reshape(self.num_columns, 2, -1)[:, 1] = 0
        return used

    def _physical_fields(self) -> dict[str, Any]:
        fields = super()._physical_fields()
        if not self.use_helper:
            fields["init_fn"] = partial(_init_codebooks, self.init_fn, self.num_columns, self.num_rows)
        return fields

    @property
    def pointer_dtype(self) -> np.dtype[np.unsignedinteger]:
        """The width that `num_rows` needs: uint8 up to 256 rows, uint16 up to 65536, else uint32."""
        return pointer_dtype(self.num_rows)


@dataclass(kw_only=True)
class CompositionalEmbeddingBagConfig(CompositionalConfig, EmbeddingBagConfig):
    """A hashed table whose IDs come in bags that are pooled. Sizes and errors: `CompositionalConfig`."""

    signed: bool = False
    """Multiply each word of an ID by +1 or -1, chosen by another hash: a count sketch (Charikar et al. 2002)."""

    def physical(self) -> EmbeddingBagConfig:
        return EmbeddingBagConfig(**self._physical_fields(), pooling=self.pooling)


@dataclass(kw_only=True)
class CCEEmbeddingBagConfig(CCEConfig, CompositionalEmbeddingBagConfig):
    """A clustered table whose IDs come in bags that are pooled. Sizes and errors: `CCEConfig`."""

    def __post_init__(self) -> None:
        _refuse_signs(self)
        super().__post_init__()


@dataclass(kw_only=True)
class QuotientRemainderEmbeddingBagConfig(CompositionalEmbeddingBagConfig):
    """A table of two words an ID, one for `id % m` and one for `id // m`, summed or concatenated (Shi et al. 2020).

    No two IDs share both words. Their product instead of their sum: `QuotientRemainderProductEmbeddingBagConfig`.
    """

    operation: Literal["sum", "concat"] = "sum"
    num_rows: int
    """`m`: rows for remainders. There are `⌈n/m⌉` for quotients."""

    def __post_init__(self) -> None:
        _refuse_signs(self)
        if self.operation not in ("sum", "concat"):
            raise ConfigError(f'table {self.name!r}: operation={self.operation!r} is not one of "sum", "concat"')
        self.num_columns, self.num_terms = (2, 1) if self.operation == "concat" else (1, 2)
        super().__post_init__()

    @property
    def num_physical_rows(self) -> int:
        return int(self.num_rows + -(-self.num_embeddings // self.num_rows))


@dataclass(kw_only=True)
class CompositionalEmbeddingConfig(CompositionalConfig, EmbeddingConfig):
    """A hashed table that gives every ID of a sequence an embedding. Sizes and errors: `CompositionalConfig`."""

    def physical(self) -> EmbeddingConfig:
        return EmbeddingConfig(**self._physical_fields())


@dataclass(kw_only=True)
class CCEEmbeddingConfig(CCEConfig, CompositionalEmbeddingConfig):
    """A clustered table that gives every ID of a sequence an embedding. Sizes and errors: `CCEConfig`."""


def _init_codebooks(
    init_fn: Callable[[torch.Tensor], object], num_columns: int, num_rows: int, weight: torch.Tensor
) -> None:
    """Fill a physical table, of zeros in the helper's rows; a shard, of which the rows are not known, all over."""
    init_fn(weight)
    if len(weight) == 2 * num_columns * num_rows:
        with torch.no_grad():
            weight.view(num_columns, 2, -1)[:, 1] = 0


def _refuse_signs(table: CompositionalEmbeddingBagConfig) -> None:
    if table.signed:
        raise ConfigError(
            f"table {table.name!r}: signed=True is for CompositionalEmbeddingBagConfig, whose words are hashed; this "
            f"is a {type(table).__name__}"
        )


def prepare_table(table: BaseEmbeddingConfig) -> None:
    """Fill in what TorchRec's configurations leave open, and raise ConfigError for names and sizes that cannot be."""
    if not table.name:
        raise ConfigError("a table needs a name")
    if not table.feature_names:
        table.feature_names = [table.name]
    for name in (table.name, *table.feature_names):
        if "@" in name:
            raise ConfigError(f"table {table.name!r}: TorchRec reads what follows '@' in {name!r} as a table name")
    for size in ("num_embeddings", "embedding_dim"):
        if getattr(table, size) < 1:
            raise ConfigError(f"table {table.name!r}: {size}={getattr(table, size)} must be at least 1")
    bound = table.embedding_dim**-0.5
    if table.weight_init_max is None:
        table.weight_init_max = bound
    if table.weight_init_min is None:
        table.weight_init_min = -bound


def check_columns(table: BaseEmbeddingConfig, num_columns: int) -> None:
    """Raise ConfigError unless a table's embeddings divide into so many columns."""
    allowed = [c for c in range(1, MAX_COLUMNS + 1) if table.embedding_dim % c == 0]
    if num_columns not in allowed:
        raise ConfigError(
            f"table {table.name!r}: num_columns={num_columns} does not divide embedding_dim={table.embedding_dim} "
            f"into 1 to {MAX_COLUMNS} columns; allowed: {', '.join(map(str, allowed))}"
        )


def pointer_dtype(num_rows: int) -> np.dtype[np.unsignedinteger]:
    """The narrowest of uint8, uint16 and uint32 that holds the pointers `0..num_rows - 1`."""
    return np.dtype(np.uint8 if num_rows <= 2**8 else np.uint16 if num_rows <= 2**16 else np.uint32)
