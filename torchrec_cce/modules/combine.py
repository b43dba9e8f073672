"""From the KeyedTensor of columns to the KeyedTensor that the caller's features name."""

from collections.abc import Sequence

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import KeyedTensor

from torchrec_cce.computed_config import ComputedEmbeddingBagConfig
from torchrec_cce.config import CompositionalConfig


class Combine(nn.Module):
    """Concatenates each feature's columns, which usually means to relabel one tensor: they lie side by side.

    Sharded tables return keys in the order of the ranks; those are regrouped by name. Mean pooling of `t·l` rows
    divides by `t`, the words of an ID, too often, which is multiplied back here.

    Args:
        tables: the caller's tables.
        physical: the tables that the inner collection holds, in the same order; of computed tables there are none.
    """

    def __init__(self, tables: Sequence[EmbeddingBagConfig], physical: Sequence[EmbeddingBagConfig]) -> None:
        super().__init__()
        names_of = dict(zip((one.name for one in physical), get_embedding_names_by_table(physical), strict=True))
        names_of |= {table.name: table.id_feature_names() for table in tables if _is_computed(table)}
        self._inner_keys = [name for table in tables for name in names_of[table.name]]
        self._keys = [name for names in get_embedding_names_by_table(tables) for name in names]
        self._dims = [table.embedding_dim for table in tables for _ in table.feature_names]
        means = {one.name for one in physical if one.pooling == PoolingType.MEAN}
        self._scales = [
            float(table.num_words) if table.name in means and isinstance(table, CompositionalConfig) else 1.0
            for table in tables
            for _ in table.feature_names
        ]

    def forward(self, columns: Sequence[KeyedTensor]) -> KeyedTensor:
        """`columns` of `[B, Σ d/c]` each, in any key order, to `[B, Σ d]` in the order of the tables."""
        if len(columns) == 1 and columns[0].keys() == self._inner_keys:
            values = columns[0].values()
        else:
            values = KeyedTensor.regroup(list(columns), [self._inner_keys])[0]
        if any(scale != 1.0 for scale in self._scales):
            scale = torch.tensor(self._scales, device=values.device, dtype=values.dtype)
            values = values * scale.repeat_interleave(torch.tensor(self._dims, device=values.device))
        return KeyedTensor(keys=self._keys, length_per_key=self._dims, values=values)


def _is_computed(table: EmbeddingBagConfig) -> bool:
    return isinstance(table, ComputedEmbeddingBagConfig)
