"""The computed tables of a collection, on all features that have one."""

from collections.abc import Sequence

import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_cce.methods.computed import ComputedEmbeddingBagConfig
from torchrec_cce.methods.registry import computed_table


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
        self._keys = [(table.name, key) for table in tables for key in table.id_feature_names()]
        self._dims = [table.embedding_dim for table in tables for _ in table.feature_names]
        self.tables = nn.ModuleDict({table.name: computed_table(table, device) for table in tables})

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """`[B, Σ d]` with one key `f#table` a feature, from the raw IDs under that key."""
        pooled = []
        for table, key in self._keys:
            bags = features[key]
            offsets = bags.offsets()
            weights = bags.weights() if self._is_weighted else None
            pooled.append(self.tables[table](bags.values(), offsets - offsets[0], weights))
        return KeyedTensor(
            keys=[key for _, key in self._keys], length_per_key=self._dims, values=torch.cat(pooled, dim=1)
        )
