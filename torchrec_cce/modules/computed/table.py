"""What all computed tables have in common: from bags of raw IDs to pooled embeddings."""

from abc import ABC, abstractmethod

import torch
from torch import nn
from torch.nn.functional import embedding_bag
from torchrec.modules.embedding_configs import PoolingType

from torchrec_cce.computed_config import ComputedEmbeddingBagConfig
from torchrec_cce.hashing import UniversalHash, derive_seed
from torchrec_cce.modules.tensor_hash import TensorHash


class ComputedTable(ABC, nn.Module):
    """A table whose embeddings are computed. A subclass makes its parameters, fills them, and embeds IDs."""

    def __init__(self, config: ComputedEmbeddingBagConfig) -> None:
        super().__init__()
        self._mode = "mean" if config.pooling == PoolingType.MEAN else "sum"
        self._seed = derive_seed(config.seed, config.name)

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw all parameters anew."""

    @abstractmethod
    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings `[N, d]` of raw `ids: [N] int64`, each inside the universe."""

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """Pooled embeddings `[B, d]` of the bags `ids[offsets[i]:offsets[i + 1]]`; those of an empty bag are 0.

        Args:
            ids: `[N] int64`.
            offsets: `[B + 1]`.
            weights: `[N]`, of the IDs, for sum pooling.
        """
        embeddings = self.embed(ids)
        if len(ids) == 0:  # still a function of all parameters, which ranks must agree on
            return embeddings.new_zeros(len(offsets) - 1, embeddings.shape[1]) + embeddings.sum()
        positions = torch.arange(len(ids), device=ids.device)
        return embedding_bag(
            positions,
            embeddings,
            offsets.to(torch.int64),
            mode=self._mode,
            per_sample_weights=weights,
            include_last_offset=True,
        )

    def _hash(self, purpose: str, *, num_functions: int, num_rows: int) -> TensorHash:
        seed = derive_seed(self._seed, purpose)
        return TensorHash(UniversalHash.from_seed(seed, num_columns=num_functions, num_rows=num_rows))


def parameter(*shape: int, device: torch.device | None) -> nn.Parameter:
    """Not filled yet."""
    return nn.Parameter(torch.empty(*shape, device=device))
