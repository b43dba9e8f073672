"""`CCEEmbeddingCollection`: TorchRec's `EmbeddingCollection`, for sequences, with compressed tables."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import Proxy
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import (
    EmbeddingCollection,
    EmbeddingCollectionInterface,
    get_embedding_names_by_table,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_cce.errors import ConfigError
from torchrec_cce.methods.cce import CCEConfig, CCEEmbeddingConfig
from torchrec_cce.methods.compositional import CompositionalConfig
from torchrec_cce.modules.bags import members_of, splittable
from torchrec_cce.modules.collection import CCECollection
from torchrec_cce.modules.quantized_rows import QuantizedSequences
from torchrec_cce.modules.state_names import (
    sequence_codewords_weight,
    sequence_residents_weight,
    sequence_weight,
)


class CCEEmbeddingCollection(CCECollection, EmbeddingCollectionInterface):
    """An embedding for every raw ID of a sequence, from tables that may be full, hashed or clustered.

    Three steps: `remap` (raw IDs → rows, on the CPU, no parameters), `ecs` (stock `EmbeddingCollection`s, which
    TorchRec shards, fuses and checkpoints like any other) and `combine` (codewords → embeddings). A stock collection
    holds tables of one width, so that `ecs` has one for each width `d/c`, with the width as its name. So has
    `codewords`, for tables with residents; the rows of these are in one stock collection, `residents`: while a phase is
    open, the one are frozen and the other is trained. Rows of float16 or int8 numbers are in `quantized_residents`.

    Args:
        tables: `EmbeddingConfig` for a full table, `CompositionalEmbeddingConfig` for a hashed one,
            `CCEEmbeddingConfig` for a clustered one, in any mixture; all of one `embedding_dim`.
        device: of the trained tables. From the meta device they are materialised by `to_empty(device=…)` and
            `reset_parameters()`.
        need_indices: whether the outputs carry the raw IDs as their weights.

    Raises:
        ConfigError: no tables, or tables of different `embedding_dim`; a pooled table; two tables of one name.

    Example:
        >>> ec = CCEEmbeddingCollection(tables=[CCEEmbeddingConfig(
        ...     name="t_item", num_embeddings=1000, embedding_dim=16, feature_names=["history"], num_rows=50)])
        >>> histories = KeyedJaggedTensor.from_lengths_sync(
        ...     keys=["history"], values=torch.tensor([3, 999, 3]), lengths=torch.tensor([2, 0, 1]))
        >>> ec(histories)["history"].values().shape
        torch.Size([3, 16])
    """

    def __init__(
        self, tables: list[EmbeddingConfig], device: torch.device | None = None, need_indices: bool = False
    ) -> None:
        super().__init__(tables, kind=EmbeddingConfig, is_weighted=False)
        dims = {table.name: table.embedding_dim for table in tables}
        if len(set(dims.values())) != 1:
            raise ConfigError(f"an EmbeddingCollection has one embedding_dim for all its tables; these have {dims}")
        self._need_indices = need_indices
        with_residents = self.configs_with_residents()
        frozen = {table.name for table in with_residents}
        self._widths = {table.name: table.embedding_dim for table in self._physical.values()}

        def stock(tables: list[EmbeddingConfig]) -> EmbeddingCollection:
            # Where they are the caller's own, they may be all that is called.
            return EmbeddingCollection(
                tables=tables, device=device, need_indices=need_indices and not self.remap.changes_keys
            )

        learning = _by_width([table for name, table in self._physical.items() if name not in frozen])
        resting = _by_width([table for name, table in self._physical.items() if name in frozen])
        self.ecs = nn.ModuleDict({str(width): stock(group) for width, group in learning.items()})
        self.codewords = nn.ModuleDict({str(width): stock(group) for width, group in resting.items()})
        rows = [table.resident_rows() for table in with_residents if table.has_stock_residents]
        self.residents = stock(rows) if rows else None
        quantized = [table for table in with_residents if not table.has_stock_residents]
        self.quantized_residents = QuantizedSequences(quantized, device=device) if quantized else None
        inner = [*learning.values(), *resting.values()]
        self.combine = CombineSequences(tables, inner, need_indices=need_indices)

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """One JaggedTensor a feature: `[N, d]` float32 embeddings of its N raw IDs, and the lengths of its bags.

        Its weights are the raw IDs with `need_indices`, else the sample weights of `features`, if there are any. An
        input that was remapped before has neither.

        Raises:
            InvalidIDError: a raw ID outside its table's universe, or not an integer; names feature and value.
            ConfigError: `need_indices` with an input that was remapped before; raw IDs or weights with
                `inverse_indices` (a variable batch per feature), by which sharded tables repeat embeddings alone.
        """
        self._before_forward(features)
        if self._inputs.are_stock(features, self.remap):
            (ec,) = self.ecs.values()  # full tables are of one width
            stock: dict[str, JaggedTensor] = ec(features)
            return stock
        inner = (*self.ecs.values(), *self.codewords.values())
        is_sharded = not any(isinstance(ec, EmbeddingCollection) for ec in inner)
        rows = self._inputs.rows(features, self.remap, is_sharded=is_sharded)
        # Those that learn are under way before the first is waited for.
        looked_up = [ec(rows) for ec in self.ecs.values()]
        residents = [stock(rows) for stock in (self.residents, self.quantized_residents) if stock is not None]
        with self._codewords_learn():
            codewords = [ec(rows) for ec in self.codewords.values()]
            for columns in codewords:
                columns.values()  # a sharded lookup ends here
        embeddings: dict[str, JaggedTensor] = self.combine(
            features, [*looked_up, *codewords], rows, residents, repeats=self._repeats
        )
        return embeddings

    @property
    def _repeats(self) -> bool:
        """Whether stock collections repeat embeddings by `inverse_indices`, as sharded ones do."""
        return any(not isinstance(ec, EmbeddingCollection) for ec in self.codewords.values())

    @property
    def embeddings(self) -> nn.ModuleDict:
        """Table → the `nn.Embedding` with its weights, as of a stock collection: to iterate, to count, to read
        `.weight`; see `CCEEmbeddingBagCollection.embedding_bags`."""
        return self._modules_of_tables()

    def embedding_configs(self) -> list[EmbeddingConfig]:
        return self._tables

    def need_indices(self) -> bool:
        return self._need_indices

    def embedding_dim(self) -> int:
        dim: int = self._tables[0].embedding_dim
        return dim

    def embedding_names_by_table(self) -> list[list[str]]:
        """The keys of the output: a feature's name, or `feature@table` if several tables have it."""
        names: list[list[str]] = get_embedding_names_by_table(self._tables)
        return names

    def weight_name(self, table: str) -> str:
        name = sequence_codewords_weight if table in self._own_remap[0].resident_tables() else sequence_weight
        return name(table, self._widths[table])

    def residents_name(self, config: CCEConfig) -> str:
        return sequence_residents_weight(config.resident_table)


def _by_width(tables: Sequence[EmbeddingConfig]) -> dict[int, list[EmbeddingConfig]]:
    groups: dict[int, list[EmbeddingConfig]] = {}
    for table in tables:
        groups.setdefault(table.embedding_dim, []).append(table)
    return groups


class _Residents(NamedTuple):
    """The private rows of one output, by their keys among the remapped features."""

    rows: str
    places: str
    is_stock: bool
    """Whether a stock collection looks them up."""


class _Sequence(NamedTuple):
    """One output."""

    name: str
    feature: str
    inner: int
    """Which inner collection looks it up."""
    columns: list[str]
    """The inner collection's names for its columns."""
    num_terms: int
    residents: _Residents | None


class CombineSequences(nn.Module):
    """Concatenates each feature's columns and sums the `t` codewords of an ID, which lie in consecutive rows.

    The rows of residents, which alone are looked up and sent between ranks, are added in their places.

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
            residents = _residents_of(table)
            for f, (name, feature) in enumerate(zip(names, table.feature_names, strict=True)):
                self._sequences.append(
                    _Sequence(
                        name=name,
                        feature=feature,
                        inner=i,
                        columns=columns[c * f : c * (f + 1)],
                        num_terms=t,
                        residents=residents[f],
                    )
                )

    def forward(
        self,
        features: KeyedJaggedTensor,
        codewords: Sequence[Mapping[str, JaggedTensor]],
        rows: KeyedJaggedTensor,
        residents: Sequence[Mapping[str, JaggedTensor]],
        *,
        repeats: bool,
    ) -> dict[str, JaggedTensor]:
        """`codewords` of `[t·N, d/c]` a column, to `[N, d]` a feature.

        Args:
            features: the caller's, for what goes along with the embeddings: raw IDs or sample weights.
            codewords: what each inner collection returned.
            rows: the remapped features, for the places of residents.
            residents: `[R, d]` of each feature with residents.
            repeats: whether stock collections have repeated embeddings by the `inverse_indices` of `rows`, if any.

        Raises:
            ConfigError: raw IDs are needed and the input has none, or none that fit the embeddings.
        """
        along = self._along(features)
        private = {key: sequence for each in residents for key, sequence in each.items()}
        repeats = repeats and rows.inverse_indices_or_none() is not None
        outputs = {}
        for sequence in self._sequences:
            columns = [codewords[sequence.inner][name] for name in sequence.columns]
            values = [column.values() for column in columns]
            whole = values[0] if len(values) == 1 else torch.cat(values, dim=1)
            whole = whole if sequence.num_terms == 1 else whole.unflatten(0, (-1, sequence.num_terms)).sum(dim=1)
            lengths = columns[0].lengths() // sequence.num_terms
            if sequence.residents is not None:
                keys = sequence.residents
                found, places = private[keys.rows], rows[keys.places]
                if repeats:
                    places = _repeated(places, rows, keys.places)
                    found = found if keys.is_stock else _repeated(found, rows, keys.rows)
                whole = _with_residents(whole, lengths, found.values(), places)
            outputs[sequence.name] = JaggedTensor(values=whole, lengths=lengths, weights=along.get(sequence.feature))
        return outputs

    def _along(self, features: KeyedJaggedTensor) -> dict[str, torch.Tensor]:
        """Feature → one value an ID: the raw ID if it is needed, else the sample's weight if there is one."""
        needed = {sequence.feature for sequence in self._sequences}
        if isinstance(features, Proxy):  # which cannot say whether it has weights, and has raw IDs
            bags_of: Any = features.to_dict() if self._need_indices else {}
            return {feature: bags_of[feature].values() for feature in needed if self._need_indices}
        weighted = features.weights_or_none() is not None
        if not (self._need_indices or weighted):
            return {}
        if features.inverse_indices_or_none() is not None:
            raise ConfigError(
                "sharded tables repeat embeddings by inverse_indices, but raw IDs and weights are not repeated; leave "
                "out inverse_indices, or need_indices and weights"
            )
        inputs = splittable(features).to_dict()
        missing = needed - inputs.keys()
        if missing and self._need_indices:
            raise ConfigError(
                f"need_indices: the input has no raw IDs of {sorted(missing)}; remap it in the collection, not before"
            )
        return {
            feature: inputs[feature].values() if self._need_indices else inputs[feature].weights()
            for feature in needed - missing
        }


def _residents_of(table: EmbeddingConfig) -> list[_Residents | None]:
    """Of each feature of a table."""
    if not isinstance(table, CCEEmbeddingConfig) or table.residents is None:
        return [None] * len(table.feature_names)
    keys = zip(table.resident_feature_names(), table.place_feature_names(), strict=True)
    return [_Residents(rows=rows, places=places, is_stock=table.has_stock_residents) for rows, places in keys]


def _with_residents(
    embeddings: torch.Tensor, lengths: torch.Tensor, rows: torch.Tensor, places: JaggedTensor
) -> torch.Tensor:
    """`embeddings: [N, d]` of bags of `lengths: [B]`, and to those of residents their `rows: [R, d]` added.

    Args:
        places: R of them, each in its own bag: bags of 2 and 3 IDs of which the first and the last are residents have
            the places 0 | 2, which are 0 and 2 + 2 of all.
    """
    starts = lengths.cumsum(0) - lengths
    return embeddings.index_add(
        0, places.values() + starts.repeat_interleave(places.lengths()), rows.to(embeddings.dtype)
    )


def _repeated(bags: JaggedTensor, features: KeyedJaggedTensor, key: str) -> JaggedTensor:
    """The bags under `key` of a variable batch, as often as its `inverse_indices` say."""
    keys, indices = features.inverse_indices()
    chosen = indices[keys.index(key)]
    members = members_of(bags.lengths(), chosen)
    return JaggedTensor(values=bags.values()[members], lengths=bags.lengths()[chosen])
