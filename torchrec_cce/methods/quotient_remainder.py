"""Quotient-remainder: a codeword for `id % m` and another for `id // m`, summed, concatenated or multiplied."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_cce.errors import ConfigError
from torchrec_cce.methods.compositional import CompositionalEmbeddingBagConfig, refuse_signs
from torchrec_cce.methods.computed import ComputedEmbeddingBagConfig, ComputedTable, parameter
from torchrec_cce.methods.table import Looked, MethodSpec, PointerScheme, Sizing, TensorRows, within


@dataclass(kw_only=True)
class QuotientRemainderEmbeddingBagConfig(CompositionalEmbeddingBagConfig):
    """A table of two codewords an ID, for `id % m` and for `id // m`, summed or concatenated (Shi et al. 2020).

    No two IDs share both codewords. Their product instead of their sum: `QuotientRemainderProductEmbeddingBagConfig`.
    """

    operation: Literal["sum", "concat"] = "sum"
    num_rows: int
    """`m`: rows for remainders. There are `⌈n/m⌉` for quotients."""

    def __post_init__(self) -> None:
        refuse_signs(self)
        if self.operation not in ("sum", "concat"):
            raise ConfigError(f'table {self.name!r}: operation={self.operation!r} is not one of "sum", "concat"')
        self.num_columns, self.num_terms = (2, 1) if self.operation == "concat" else (1, 2)
        super().__post_init__()

    @property
    def num_physical_rows(self) -> int:
        return int(self.num_rows + -(-self.num_embeddings // self.num_rows))

    def scheme(self) -> PointerScheme:
        return QuotientRemainderScheme(
            num_ids=self.num_embeddings,
            num_remainders=self.num_rows,
            num_columns=self.num_columns,
            num_terms=self.num_terms,
        )


@dataclass(frozen=True, kw_only=True)
class QuotientRemainderScheme:
    """A codeword by `id % m`, and another by `id // m`, whose rows come after the `m` of the first."""

    num_ids: int
    num_remainders: int
    """`m`."""
    num_columns: int
    num_terms: int
    """One of the two is 2, the other 1: codewords are concatenated or summed."""

    def rows_into(self, ids: npt.NDArray[np.int64], out: npt.NDArray[np.int64]) -> Looked:
        quotients, remainders = np.divmod(ids, self.num_remainders)
        codewords = out[0] if self.num_columns == 1 else out[:, :, 0].T  # [N, 2], a view
        codewords[:, 0] = remainders
        codewords[:, 1] = self.num_remainders + quotients
        bad = np.flatnonzero((ids < 0) | (ids >= self.num_ids))
        return Looked(bad=int(bad[0]) if len(bad) else -1)

    def on_tensors(self) -> Callable[[torch.Tensor], TensorRows]:
        def found(ids: torch.Tensor) -> TensorRows:
            remainders, quotients = ids % self.num_remainders, ids // self.num_remainders
            codewords = torch.stack([remainders, self.num_remainders + quotients])  # [2, N]
            rows = codewords.t()[None] if self.num_columns == 1 else codewords[:, :, None]
            return TensorRows(rows, known=within(ids, self.num_ids))

        return found


@dataclass(kw_only=True)
class QuotientRemainderProductEmbeddingBagConfig(ComputedEmbeddingBagConfig):
    """The elementwise product of a codeword for `id % m` and another for `id // m` (Shi et al. 2020)."""

    num_rows: int
    """`m`: rows for remainders. There are `⌈n/m⌉` for quotients."""

    def __post_init__(self) -> None:
        self._check_positive(num_rows=self.num_rows)
        super().__post_init__()

    @property
    def num_quotients(self) -> int:
        return int(-(-self.num_embeddings // self.num_rows))

    @property
    def num_parameters(self) -> int:
        return int((self.num_rows + self.num_quotients) * self.embedding_dim)

    def build(self, device: torch.device | None = None) -> "QuotientRemainderProduct":
        return QuotientRemainderProduct(self, device)


class QuotientRemainderProduct(ComputedTable):
    """`remainders[id % m] · quotients[id // m]`, element by element."""

    def __init__(self, config: QuotientRemainderProductEmbeddingBagConfig, device: torch.device | None = None) -> None:
        super().__init__(config)
        self._bound = (3 / config.embedding_dim) ** 0.25
        self.remainders = parameter(config.num_rows, config.embedding_dim, device=device)
        self.quotients = parameter(config.num_quotients, config.embedding_dim, device=device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform, so that a product has the variance 1/(3d) of a table uniform within ±1/√d: (b²/3)² = 1/(3d)."""
        for codewords in (self.remainders, self.quotients):
            torch.nn.init.uniform_(codewords, -self._bound, self._bound)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        m = len(self.remainders)
        return self.remainders[ids % m] * self.quotients[ids // m]


def _looked_up(sizing: Sizing, operation: Literal["sum", "concat"]) -> EmbeddingBagConfig:
    rows = _num_remainders(sizing, sizing.table.embedding_dim // (2 if operation == "concat" else 1))
    return sizing.make(QuotientRemainderEmbeddingBagConfig, num_rows=rows, operation=operation)


def _multiplied(sizing: Sizing) -> EmbeddingBagConfig:
    rows = _num_remainders(sizing, sizing.table.embedding_dim)
    return sizing.make(QuotientRemainderProductEmbeddingBagConfig, num_rows=rows)


def _num_remainders(sizing: Sizing, width: int) -> int:
    """`m`: the largest with `m + ⌈n/m⌉` rows of `width` in `max_parameters`."""
    n = sizing.table.num_embeddings
    rows = sizing.max_parameters // max(1, width)
    smallest = math.isqrt(n - 1) + 1
    least = min(m + -(-n // m) for m in (smallest, max(1, smallest - 1)))
    sizing.at_least(rows, least, needed=least * width)
    m = (rows + math.isqrt(max(0, rows**2 - 4 * n))) // 2
    while m + -(-n // m) > rows:
        m -= 1
    return m


_FAMILY = "quotients and computed tables"
METHODS = (
    MethodSpec(name="qr_sum", family=_FAMILY, size=partial(_looked_up, operation="sum")),
    MethodSpec(name="qr_concat", family=_FAMILY, size=partial(_looked_up, operation="concat")),
    MethodSpec(name="qr_product", family=_FAMILY, size=_multiplied),
)
