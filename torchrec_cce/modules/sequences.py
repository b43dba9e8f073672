"""From looked-up words to one embedding an ID: the unpooled counterpart of `combine`."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_cce.config import CompositionalConfig
from torchrec_cce.errors import ConfigError


class _Sequence(NamedTuple):
    """One output."""

    name: str
    feature: str
    inner: int
    """Which inner collection looks it up."""
    columns: list[str]
    """The inner collection's names for its columns."""
    num_terms: int


class CombineSequences(nn.Module):
    """Concatenates each feature's columns and sums the `t` words of an ID, which lie in consecutive rows.

    Args:
        tables: the caller's tables.
        inner: the physical tables of each inner collection.
        need_indices: whether the outputs carry the raw IDs.
    """

    def __init__(
        self, tables: Sequence[EmbeddingConfig], inner: Sequence[Sequence[EmbeddingConfig]], *, need_indices: bool
    ) -> None:
        super().__init__()
        self._need_indices = need_indices
        columns_of = {
            table.name: (i, names)
            for i, group in enumerate(inner)
            for table, names in zip(group, get_embedding_names_by_table(group), strict=True)
        }
        self._sequences = []
        for table, names in zip(tables, get_embedding_names_by_table(tables), strict=True):
            c, t = (table.num_columns, table.num_words) if isinstance(table, CompositionalConfig) else (1, 1)
            i, columns = columns_of[table.name]
            for f, (name, feature) in enumerate(zip(names, table.feature_names, strict=True)):
                self._sequences.append(
                    _Sequence(name=name, feature=feature, inner=i, columns=columns[c * f : c * (f + 1)], num_terms=t)
                )

    def forward(
        self, features: KeyedJaggedTensor, words: Sequence[Mapping[str, JaggedTensor]]
    ) -> dict[str, JaggedTensor]:
        """`words` of `[t·N, d/c]` a column, to `[N, d]` a feature.

        Args:
            features: the caller's, for what goes along with the embeddings: raw IDs or sample weights.
            words: what each inner collection returned.

        Raises:
            ConfigError: raw IDs are needed and the input has none, or none that fit the embeddings.
        """
        along = self._along(features)
        outputs = {}
        for one in self._sequences:
            columns = [words[one.inner][name] for name in one.columns]
            values = [column.values() for column in columns]
            whole = values[0] if len(values) == 1 else torch.cat(values, dim=1)
            outputs[one.name] = JaggedTensor(
                values=whole if one.num_terms == 1 else whole.unflatten(0, (-1, one.num_terms)).sum(dim=1),
                lengths=columns[0].lengths() // one.num_terms,
                weights=along.get(one.feature),
            )
        return outputs

    def _along(self, features: KeyedJaggedTensor) -> dict[str, torch.Tensor]:
        """Feature → one value an ID: the raw ID if it is needed, else the sample's weight if there is one."""
        weighted = features.weights_or_none() is not None
        if not (self._need_indices or weighted):
            return {}
        if features.inverse_indices_or_none() is not None:
            raise ConfigError(
                "sharded tables repeat embeddings by inverse_indices, but raw IDs and weights are not repeated; leave "
                "out inverse_indices, or need_indices and weights"
            )
        inputs = features.to_dict()
        needed = {one.feature for one in self._sequences}
        missing = needed - inputs.keys()
        if missing and self._need_indices:
            raise ConfigError(
                f"need_indices: the input has no raw IDs of {sorted(missing)}; remap it in the collection, not before"
            )
        return {
            feature: inputs[feature].values() if self._need_indices else inputs[feature].weights()
            for feature in needed - missing
        }
