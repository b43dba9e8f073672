"""A table of low rank."""

import torch
from torch.nn.functional import embedding

from torchrec_cce.computed_config import LowRankEmbeddingBagConfig
from torchrec_cce.modules.computed.table import ComputedTable, parameter


class LowRank(ComputedTable):
    """`rows[id] @ projection`."""

    def __init__(self, config: LowRankEmbeddingBagConfig, device: torch.device | None = None) -> None:
        super().__init__(config)
        self.rows = parameter(config.num_embeddings, config.rank, device=device)
        self.projection = parameter(config.rank, config.embedding_dim, device=device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal, so that a sum of `r` products has the variance 1/(3d) of a table uniform within ±1/√d."""
        r, d = self.projection.shape
        for part in (self.rows, self.projection):
            torch.nn.init.normal_(part, std=(3 * d * r) ** -0.25)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return embedding(ids, self.rows) @ self.projection
