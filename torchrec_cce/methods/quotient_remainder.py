"""Table configurations: what a user writes instead of `torchrec.EmbeddingBagConfig` and `torchrec.EmbeddingConfig`.

They are dataclasses like TorchRec's own (and therefore not frozen), keyword-only in what they add, and checked where
they are built.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from torchrec_cce.errors import ConfigError
from torchrec_cce.methods.compositional import CompositionalEmbeddingBagConfig, refuse_signs
from torchrec_cce.methods.computed import ComputedEmbeddingBagConfig, ComputedTable, parameter
from torchrec_cce.methods.scheme import Looked


@dataclass(kw_only=True)
class QuotientRemainderEmbeddingBagConfig(CompositionalEmbeddingBagConfig):
    """A table of two words an ID, one for `id % m` and one for `id // m`, summed or concatenated (Shi et al. 2020).

    No two IDs share both words. Their product instead of their sum: `QuotientRemainderProductEmbeddingBagConfig`.
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


@dataclass(kw_only=True)
class QuotientRemainderProductEmbeddingBagConfig(ComputedEmbeddingBagConfig):
    """The elementwise product of a word for `id % m` and one for `id // m` (Shi et al. 2020)."""

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
        for words in (self.remainders, self.quotients):
            torch.nn.init.uniform_(words, -self._bound, self._bound)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        m = len(self.remainders)
        return self.remainders[ids % m] * self.quotients[ids // m]
