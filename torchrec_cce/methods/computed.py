"""Configurations of tables whose embeddings are computed from the raw ID and shared parameters, not looked up as rows.

A stock TorchRec table cannot hold them. They are small, and every rank has a replica.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import embedding_bag
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType

from torchrec_cce.errors import ConfigError
from torchrec_cce.hashing import UniversalHash, derive_seed
from torchrec_cce.methods.table import prepare_table
from torchrec_cce.methods.tensor_hash import TensorHash


@dataclass(kw_only=True)
class ComputedEmbeddingBagConfig(EmbeddingBagConfig, ABC):
    """A table of `num_embeddings` raw IDs whose embeddings are computed.

    Raises:
        ConfigError: the sizes do not fit together; the message names the nearest that do.
    """

    seed: int = 0
    """Of the hash functions. Tables of different names get different functions from one seed."""

    def __post_init__(self) -> None:
        prepare_table(self)
        super().__post_init__()

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """Trained parameters."""

    @property
    def pointer_bytes(self) -> int:
        """Bytes of stored index pointers."""
        return 0

    def id_feature_names(self) -> list[str]:
        """What the raw IDs of each feature are called on their way to the table: `f#table`."""
        return [f"{feature}#{self.name}" for feature in self.feature_names]

    def _check_positive(self, **sizes: int) -> None:
        for name, value in sizes.items():
            if value < 1:
                raise ConfigError(f"table {self.name!r}: {name}={value} must be at least 1")


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
