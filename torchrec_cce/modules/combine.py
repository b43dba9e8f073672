"""From the KeyedTensor of columns to the KeyedTensor that the caller's features name."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from torchrec_cce.errors import ConfigError
from torchrec_cce.methods.cce import CCEConfig
from torchrec_cce.methods.compositional import CompositionalConfig
from torchrec_cce.methods.table import row_feature_names


class Combine(nn.Module):
    """Concatenates each feature's columns, which usually means to relabel one tensor: they lie side by side.

    Sharded tables return keys in the order of the ranks; those are regrouped by name. Mean pooling of `t·l` rows
    divides by `t`, the codewords of an ID, too often, which is multiplied back here.

    Args:
        tables: the caller's tables.
        physical: the tables that the inner collection holds, in the same order; of computed tables there are none.
    """

    def __init__(self, tables: Sequence[EmbeddingBagConfig], physical: Sequence[EmbeddingBagConfig]) -> None:
        super().__init__()
        names_of = {table.name: row_feature_names(table) for table in tables}
        names_of |= zip((table.name for table in physical), get_embedding_names_by_table(physical), strict=True)
        self._inner_keys = [name for table in tables for name in names_of[table.name]]
        self._keys = [name for names in get_embedding_names_by_table(tables) for name in names]
        self._dims = [table.embedding_dim for table in tables for _ in table.feature_names]
        means = {table.name for table in physical if table.pooling == PoolingType.MEAN}
        self._scales = [
            float(table.num_codewords) if table.name in means and isinstance(table, CompositionalConfig) else 1.0
            for table in tables
            for _ in table.feature_names
        ]
        self._resident_keys = [
            key
            for table in tables
            for key in (
                table.resident_feature_names()
                if isinstance(table, CCEConfig) and table.residents is not None
                else [None] * len(table.feature_names)
            )
        ]

    def forward(self, columns: Sequence[KeyedTensor], residents: Sequence[KeyedTensor] = ()) -> KeyedTensor:
        """`columns` of `[B, Σ d/c]` each, in any key order, to `[B, Σ d]` in the order of the tables.

        Args:
            residents: `[B, Σ d]` of the tables with residents, which are added to theirs.
        """
        if len(columns) == 1 and columns[0].keys() == self._inner_keys:
            values = columns[0].values()
        else:
            values = KeyedTensor.regroup(list(columns), [self._inner_keys])[0]
        if any(scale != 1.0 for scale in self._scales):
            scale = torch.tensor(self._scales, device=values.device, dtype=values.dtype)
            values = values * scale.repeat_interleave(torch.tensor(self._dims, device=values.device))
        if residents:
            rows = {key: value for each in residents for key, value in each.to_dict().items()}
            parts = values.split(self._dims, dim=1)
            added = [
                part if key is None else part + rows[key] for part, key in zip(parts, self._resident_keys, strict=True)
            ]
            values = torch.cat(added, dim=1)
        return KeyedTensor(keys=self._keys, length_per_key=self._dims, values=values)


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
    """Concatenates each feature's columns and sums the `t` codewords of an ID, which lie in consecutive rows.

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
            c, t = (table.num_columns, table.num_codewords) if isinstance(table, CompositionalConfig) else (1, 1)
            i, columns = columns_of[table.name]
            for f, (name, feature) in enumerate(zip(names, table.feature_names, strict=True)):
                self._sequences.append(
                    _Sequence(name=name, feature=feature, inner=i, columns=columns[c * f : c * (f + 1)], num_terms=t)
                )

    def forward(
        self, features: KeyedJaggedTensor, codewords: Sequence[Mapping[str, JaggedTensor]]
    ) -> dict[str, JaggedTensor]:
        """`codewords` of `[t·N, d/c]` a column, to `[N, d]` a feature.

        Args:
            features: the caller's, for what goes along with the embeddings: raw IDs or sample weights.
            codewords: what each inner collection returned.

        Raises:
            ConfigError: raw IDs are needed and the input has none, or none that fit the embeddings.
        """
        along = self._along(features)
        outputs = {}
        for sequence in self._sequences:
            columns = [codewords[sequence.inner][name] for name in sequence.columns]
            values = [column.values() for column in columns]
            whole = values[0] if len(values) == 1 else torch.cat(values, dim=1)
            outputs[sequence.name] = JaggedTensor(
                values=whole if sequence.num_terms == 1 else whole.unflatten(0, (-1, sequence.num_terms)).sum(dim=1),
                lengths=columns[0].lengths() // sequence.num_terms,
                weights=along.get(sequence.feature),
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
        needed = {sequence.feature for sequence in self._sequences}
        missing = needed - inputs.keys()
        if missing and self._need_indices:
            raise ConfigError(
                f"need_indices: the input has no raw IDs of {sorted(missing)}; remap it in the collection, not before"
            )
        return {
            feature: inputs[feature].values() if self._need_indices else inputs[feature].weights()
            for feature in needed - missing
        }
