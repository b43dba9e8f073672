"""Low rank: a table of narrow rows times a matrix."""

from dataclasses import dataclass

import torch
from torch.nn.functional import embedding
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_cce.errors import ConfigError
from torchrec_cce.methods.computed import ComputedEmbeddingBagConfig, ComputedTable, parameter
from torchrec_cce.methods.sizing import MethodSpec, Sizing


@dataclass(kw_only=True)
class LowRankEmbeddingBagConfig(ComputedEmbeddingBagConfig):
    """A table `[n, r]` of narrow rows times a matrix `[r, d]`."""

    rank: int
    """`r`: 1 to `embedding_dim`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.rank <= self.embedding_dim:
            raise ConfigError(f"table {self.name!r}: rank={self.rank} is not in 1..{self.embedding_dim}, embedding_dim")

    @property
    def num_parameters(self) -> int:
        return int(self.rank * (self.num_embeddings + self.embedding_dim))

    def build(self, device: torch.device | None = None) -> "LowRank":
        return LowRank(self, device)


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


def _low_rank(sizing: Sizing) -> EmbeddingBagConfig:
    n, d = sizing.table.num_embeddings, sizing.table.embedding_dim
    return sizing.make(LowRankEmbeddingBagConfig, rank=min(sizing.rows(n + d), d))


METHODS = (MethodSpec(name="low_rank", family="quotients and computed tables", size=_low_rank),)
