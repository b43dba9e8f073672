"""Tables whose embeddings are computed from the raw ID and shared parameters, not looked up as rows.

A stock TorchRec table cannot hold them. They are small, and every rank has a replica.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import embedding_bag
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_cce.hashing import UniversalHash, derive_seed
from torchrec_cce.methods.table import CompressedConfig, FullScheme, PointerScheme
from torchrec_cce.methods.tensor_hash import TensorHash


@dataclass(kw_only=True)
class ComputedEmbeddingBagConfig(CompressedConfig, EmbeddingBagConfig):
    """A table of `num_embeddings` raw IDs whose embeddings are computed.

    Raises:
        ConfigError: the sizes do not fit together; the message names the nearest that do.
    """

    @property
    def has_rows(self) -> bool:
        """Whether its one parameter is `[rows, d]`, and its rows are embeddings, as rowwise optimizers want them."""
        return False

    @abstractmethod
    def build(self, device: torch.device | None = None) -> "ComputedTable":
        """The module that computes the embeddings, its parameters filled unless `device` is the meta device."""

    def scheme(self) -> PointerScheme:
        """The module takes the raw IDs themselves."""
        return FullScheme(num_ids=self.num_embeddings)

    def row_feature_names(self) -> list[str]:
        """What the raw IDs of each feature are called on their way to the table: `f#table`."""
        return [f"{feature}#{self.name}" for feature in self.feature_names]


class ComputedTable(ABC, nn.Module):
    """A table whose embeddings are computed. A subclass makes its parameters, fills them, and embeds IDs."""

    def __init__(self, config: ComputedEmbeddingBagConfig) -> None:
        super().__init__()
        self.has_rows = config.has_rows
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
            weights: `[N]`, of the IDs, for sum pooling, of any float type.
        """
        embeddings = self.embed(ids)
        has_none = not torch.compiler.is_exporting() and len(ids) == 0
        if has_none:  # still a function of all parameters, which ranks must agree on
            return embeddings.new_zeros(len(offsets) - 1, embeddings.shape[1]) + embeddings.sum()
        positions = torch.arange(ids.shape[0], device=ids.device)
        return embedding_bag(
            positions,
            embeddings,
            offsets.to(torch.int64),
            mode=self._mode,
            per_sample_weights=None if weights is None else weights.to(embeddings.dtype),
            include_last_offset=True,
        )

    def _hash(self, purpose: str, *, num_functions: int, num_rows: int) -> TensorHash:
        seed = derive_seed(self._seed, purpose)
        return TensorHash(UniversalHash.from_seed(seed, num_columns=num_functions, num_rows=num_rows))


def parameter(*shape: int, device: torch.device | None) -> nn.Parameter:
    """Not filled yet."""
    return nn.Parameter(torch.empty(*shape, device=device))


class ComputedTables(nn.Module):
    """Pooled embeddings of computed tables, as an `EmbeddingBagCollection` returns those of its own.

    Args:
        tables: their configurations.
        is_weighted: whether the input's weights are of the raw IDs; else they are of no concern here.
        device: of the parameters.
    """

    def __init__(
        self, tables: Sequence[ComputedEmbeddingBagConfig], *, is_weighted: bool, device: torch.device | None
    ) -> None:
        super().__init__()
        self._is_weighted = is_weighted
        self._keys = [(table.name, key) for table in tables for key in table.row_feature_names()]
        self._dims = [table.embedding_dim for table in tables for _ in table.feature_names]
        self.tables = nn.ModuleDict({table.name: table.build(device) for table in tables})

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """`[B, Σ d]` float32 with one key `f#table` a feature, from the raw IDs under that key."""
        pooled = []
        for table, key in self._keys:
            bags = features[key]
            offsets = bags.offsets()
            weights = bags.weights() if self._is_weighted else None
            pooled.append(self.tables[table](bags.values(), offsets - offsets[0], weights).float())
        return KeyedTensor(
            keys=[key for _, key in self._keys], length_per_key=self._dims, values=torch.cat(pooled, dim=1)
        )
