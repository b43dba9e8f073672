"""Quotient-remainder with a product, which no pooled lookup can make."""

import torch

from torchrec_cce.computed_config import QuotientRemainderProductEmbeddingBagConfig
from torchrec_cce.modules.computed.table import ComputedTable, parameter


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
