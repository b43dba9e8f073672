"""`CCEEmbeddingBagCollection`: TorchRec's `EmbeddingBagCollection` with compressed tables."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import torch
from torch import nn
from torch.fx import Proxy
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingBagCollectionInterface,
    get_embedding_names_by_table,
)
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_cce.errors import ConfigError
from torchrec_cce.methods.cce import CCEConfig
from torchrec_cce.methods.compositional import CompositionalConfig
from torchrec_cce.methods.computed import ComputedEmbeddingBagConfig, ComputedTables
from torchrec_cce.methods.table import row_feature_names
from torchrec_cce.methods.tensor_hash import Constant
from torchrec_cce.modules.collection import CCECollection
from torchrec_cce.modules.packed_lookup import PackedLookups, can_be_packed
from torchrec_cce.modules.quantized_rows import QuantizedRows
from torchrec_cce.modules.row_keys import row_segments
from torchrec_cce.modules.state_names import codewords_weight, pooled_weight, residents_weight

_PARTS = ("ebc", "codewords", "residents", "quantized_residents")
"""In the order of `row_segments`."""


class CCEEmbeddingBagCollection(CCECollection, EmbeddingBagCollectionInterface):
    """Pooled embeddings of raw IDs, from tables that may be full, hashed or clustered.

    Three steps: `remap` (raw IDs → rows, on the CPU, no parameters), `ebc` (a stock `EmbeddingBagCollection`, which
    TorchRec shards, fuses, checkpoints and quantizes like any other) and `combine` (columns → the caller's features).
    Tables that are computed and not looked up are in `computed`, and replicated; without others, `ebc` is None. The
    codewords of tables with residents, and the rows of these, are stock collections of their own, `codewords` and
    `residents`: while a phase is open, the one is frozen and the other is trained. Rows of float16 or int8 numbers are
    in `quantized_residents`.

    Args:
        tables: `EmbeddingBagConfig` for a full table, `CompositionalEmbeddingBagConfig` for a hashed one,
            `CCEEmbeddingBagConfig` for a clustered one, or what derives from `ComputedEmbeddingBagConfig`, in any
            mixture.
        is_weighted: whether the input carries per-sample weights.
        device: of the trained tables. From the meta device they are materialised by `to_empty(device=…)` and
            `reset_parameters()`.

    Raises:
        ConfigError: mean pooling of weighted bags, which TorchRec does not define; an unpooled table; two tables of one
            name.

    Example:
        >>> ebc = CCEEmbeddingBagCollection(tables=[CCEEmbeddingBagConfig(
        ...     name="t_user", num_embeddings=1000, embedding_dim=16, feature_names=["user"], num_rows=50)])
        >>> users = KeyedJaggedTensor.from_lengths_sync(
        ...     keys=["user"], values=torch.tensor([3, 999]), lengths=torch.tensor([1, 0, 1]))
        >>> ebc(users)["user"].shape
        torch.Size([3, 16])
    """

    def __init__(
        self,
        tables: list[EmbeddingBagConfig],
        is_weighted: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(tables, kind=EmbeddingBagConfig, is_weighted=is_weighted)
        for table in tables:
            if is_weighted and table.pooling == PoolingType.MEAN:
                raise ConfigError(
                    f"table {table.name!r}: mean pooling is not defined for weighted bags; use PoolingType.SUM"
                )
        self._is_weighted = is_weighted
        if self.remap.makes_weights:  # which divide by the length of a bag where means are wanted
            self._physical = {n: replace(table, pooling=PoolingType.SUM) for n, table in self._physical.items()}
        with_residents = self.configs_with_residents()
        frozen = {table.name for table in with_residents}

        def stock(tables: list[EmbeddingBagConfig]) -> EmbeddingBagCollection | None:
            weighted = self.remap.makes_weights
            return EmbeddingBagCollection(tables=tables, is_weighted=weighted, device=device) if tables else None

        trained = [table for name, table in self._physical.items() if name not in frozen]
        codewords = [table for name, table in self._physical.items() if name in frozen]
        self.ebc, self.codewords = stock(trained), stock(codewords)
        quantized = [table for table in with_residents if not table.has_stock_residents]
        self.residents = stock([table.resident_rows() for table in with_residents if table not in quantized])
        self.quantized_residents = QuantizedRows(quantized, device=device) if quantized else None
        computed = [table for table in tables if isinstance(table, ComputedEmbeddingBagConfig)]
        self.computed = ComputedTables(computed, is_weighted=is_weighted, device=device) if computed else None
        self.split = Split(tables) if with_residents else None
        self.combine = Combine(tables, list(self._physical.values()))
        self._packed = {
            part: PackedLookups([table.name for table in tables])
            for part, tables in (("ebc", trained), ("codewords", codewords))
        }

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pooled embeddings, `[B, Σ d]` float32 with one key a feature, of bags of raw IDs.

        Raises:
            InvalidIDError: a raw ID outside its table's universe, or not an integer; names feature and value.
        """
        self._before_forward(features)
        packed = self._look_up_packed(features)
        if "ebc" in packed and self.split is None:
            return self.combine.label(packed["ebc"])
        if self.ebc is not None and self._inputs.are_stock(features, self.remap):
            stock: KeyedTensor = self.ebc(features)
            return stock
        parts = self._parts(features, list(packed))
        looked_up = [self.combine.columns(self._packed[part].tables, found) for part, found in packed.items()]
        # Under way, if sharded, while others are computed.
        if self.ebc is not None and "ebc" not in packed:
            looked_up.append(self.ebc(parts[0]))
        residents = [] if self.residents is None else [self.residents(parts[2])]
        if self.quantized_residents is not None:
            residents.append(self.quantized_residents(parts[3]))
        if self.codewords is not None and "codewords" not in packed:
            looked_up.append(self._look_codewords_up(parts[1]))
        if self.computed is not None:
            looked_up.append(self.computed(parts[0]))
        pooled: KeyedTensor = self.combine(looked_up, residents, is_scaled="ebc" not in packed)
        return pooled

    def look_up(self, keys: Sequence[str], values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """What `forward` finds for a request, without a KeyedJaggedTensor, gradients and weights of samples.

        A request of a few rows takes half the time so.

        Args:
            keys: the features, in the order of the request.
            values: [N] int64 or int32, on the CPU: raw IDs of the first feature, then those of the next.
            offsets: [F · B + 1] int64: where in `values` each bag begins.

        Returns:
            Embeddings, `[B, Σ d]` float32, side by side as in `forward`.

        Raises:
            ConfigError: tables are sharded, quantized, computed, have residents or hooks, or `keys` lacks a feature.
            InvalidIDError: as in `forward`.
        """
        self._check_copies()
        is_int = values.dtype in (torch.int64, torch.int32) and offsets.dtype == torch.int64
        found = None
        if is_int and values.is_cpu and offsets.is_cpu and self._is_bare and not self._is_weighted:
            found = self._packed["ebc"].of_request(
                self.remap, self.ebc, list(keys), values.contiguous(), offsets.contiguous()
            )
        if found is None:
            raise ConfigError(
                f"features {list(keys)} with values of {values.dtype} and offsets of {offsets.dtype} cannot be looked "
                "up without a KeyedJaggedTensor: that takes int64 or int32 values, int64 offsets and all features, on "
                "the CPU, and tables that are plain float32 parameters; call the collection"
            )
        return found

    @property
    def is_packable(self) -> bool:
        """Whether raw IDs of tables without residents can be looked up in one step, from weights that allow it."""
        tables = self._packed["ebc"].tables
        return bool(tables) and can_be_packed(self._own_remap[0], tables) and self.computed is None

    @property
    def takes_words(self) -> bool:
        """Whether words of remapped data, as `remap.word_form` has them, are looked up in one step now: from plain
        parameters, or replicas, on this CPU. Elsewhere they become rows first."""
        return self._is_bare and self._packed["ebc"].takes_words(self.remap, self.ebc)

    @property
    def _is_bare(self) -> bool:
        """Whether no other module than `ebc` has tables, and none has taken the place of the remap."""
        others = (self.codewords, self.residents, self.quantized_residents, self.computed)
        return self.remap is self._own_remap[0] and all(module is None for module in others)

    def _look_up_packed(self, features: KeyedJaggedTensor) -> dict[str, torch.Tensor]:
        """`ebc` and `codewords` → what is looked up in one step, where nothing takes part but maps and this CPU's
        weights."""
        is_elsewhere = torch.compiler.is_exporting() or torch.jit.is_tracing()  # where none of our operators is
        if self.remap is not self._own_remap[0] or self.computed is not None or is_elsewhere:
            return {}
        found = {"ebc": self._packed["ebc"].pooled(self.remap, self.ebc, features, weighted=self._is_weighted)}
        if self.codewords is not None:
            with self._codewords_learn():
                found["codewords"] = self._packed["codewords"].pooled(
                    self.remap, self.codewords, features, weighted=self._is_weighted
                )
        return {part: pooled for part, pooled in found.items() if pooled is not None}

    def _parts(self, features: KeyedJaggedTensor, packed: Sequence[str]) -> list[KeyedJaggedTensor]:
        """The rows that each stock collection is given, see `row_segments`.

        Args:
            packed: those that are given none.
        """
        is_sharded = not any(isinstance(part, EmbeddingBagCollection) for part in self.children())
        dtype = None if is_sharded else next(self.parameters()).dtype
        tables = None
        if packed:
            tables = {name for part, lookups in self._packed.items() if part not in packed for name in lookups.tables}
        rows = self._inputs.rows(features, self.remap, dtype, is_sharded=is_sharded, tables=tables)
        return [rows] if self.split is None else self.split(rows, packed)

    def _look_codewords_up(self, rows: KeyedJaggedTensor) -> KeyedTensor:
        assert self.codewords is not None
        with self._codewords_learn():
            columns: KeyedTensor = self.codewords(rows)
            columns.values()  # a sharded lookup ends here
        return columns

    @property
    def embedding_bags(self) -> nn.ModuleDict:
        """Table → the module with its weights, as of a stock collection: to iterate, to count, to read `.weight`.

        That of a full table is its `nn.EmbeddingBag`. The rows of one that is compressed are codewords, `d/c` wide, and
        raw IDs do not lead to them: only the collection looks those up. A computed table has other parameters than a
        `weight`. Rows of residents are left out.

        It is a new dict each time: what is assigned to its keys does not become part of the collection.
        """
        return self._modules_of_tables()

    @property
    def tbes(self) -> nn.ModuleList:
        """The kernels of quantized tables, as of a quantized collection of TorchRec's; before, there is no such
        attribute."""
        stock = [part for part in (self.ebc, self.codewords, self.residents) if part is not None]
        return nn.ModuleList([kernel for part in stock for kernel in part.tbes])

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        return self._tables

    def is_weighted(self) -> bool:
        return self._is_weighted

    def weight_name(self, table: str) -> str:
        return codewords_weight(table) if table in self._own_remap[0].resident_tables() else pooled_weight(table)

    def residents_name(self, config: CCEConfig) -> str:
        return residents_weight(config.resident_table)


class Split(nn.Module):
    """Gives each inner collection its own features, as views: from all of them it would permute, and so copy, its own.

    Args:
        tables: the caller's tables.
    """

    def __init__(self, tables: Sequence[EmbeddingBagConfig]) -> None:
        super().__init__()
        self._segments = list(row_segments(tables))

    def forward(self, rows: KeyedJaggedTensor, left_out: Sequence[str] = ()) -> list[KeyedJaggedTensor]:
        """The parts of `rows` in the order of `row_segments`; of those left out there are no keys."""
        if rows.inverse_indices_or_none() is not None:  # of a variable batch, which a part would lose
            return [rows] * len(self._segments)
        segments = [0 if name in left_out else length for name, length in zip(_PARTS, self._segments, strict=True)]
        parts: list[KeyedJaggedTensor] = rows.split(segments)
        return parts


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
        self._columns_of = {table.name: (names_of[table.name], table.embedding_dim) for table in physical}
        self._inner_keys = [name for table in tables for name in names_of[table.name]]
        self._keys = [name for names in get_embedding_names_by_table(tables) for name in names]
        self.dims = [table.embedding_dim for table in tables for _ in table.feature_names]
        """The width of each feature's embeddings."""
        means = {table.name for table in physical if table.pooling == PoolingType.MEAN}
        scales = [
            float(table.num_codewords) if table.name in means and isinstance(table, CompositionalConfig) else 1.0
            for table in tables
            for _ in range(table.embedding_dim * len(table.feature_names))
        ]
        is_scaled = any(scale != 1.0 for scale in scales)
        self._scales = Constant(torch.from_numpy(np.array(scales, np.float32))) if is_scaled else None
        self._resident_keys = [
            key
            for table in tables
            for key in (
                table.resident_feature_names()
                if isinstance(table, CCEConfig) and table.residents is not None
                else [None] * len(table.feature_names)
            )
        ]

    def columns(self, tables: Sequence[str], values: torch.Tensor) -> KeyedTensor:
        """`values: [B, Σ d]` of some tables, in this order, with the keys that the inner collections give them."""
        keys = [key for table in tables for key in self._columns_of[table][0]]
        widths = [width for table in tables for names, width in (self._columns_of[table],) for _ in names]
        return KeyedTensor(keys=keys, length_per_key=widths, values=values)

    def forward(
        self,
        columns: Sequence[KeyedTensor],
        residents: Sequence[KeyedTensor] = (),
        is_scaled: bool = True,
    ) -> KeyedTensor:
        """`columns` of `[B, Σ d/c]` each, in any key order, to `[B, Σ d]` in the order of the tables.

        Args:
            residents: `[B, Σ d]` of the tables with residents, which are added to theirs.
            is_scaled: whether means are to be multiplied.
        """
        # In a symbolic trace no tables are sharded.
        if len(columns) == 1 and (isinstance(columns[0], Proxy) or columns[0].keys() == self._inner_keys):
            values = columns[0].values()
        else:
            values = KeyedTensor.regroup(list(columns), [self._inner_keys])[0]
        if is_scaled and self._scales is not None:
            values = values * self._scales.on(values.device).type_as(values)
        if len(residents) == 1 and residents[0].keys() == self._resident_keys:
            values = values + residents[0].values()
        elif residents:
            rows = {key: value for each in residents for key, value in each.to_dict().items()}
            parts = values.split(self.dims, dim=1)
            added = [
                part if key is None else part + rows[key] for part, key in zip(parts, self._resident_keys, strict=True)
            ]
            values = torch.cat(added, dim=1)
        return self.label(values)

    def label(self, values: torch.Tensor) -> KeyedTensor:
        """`values: [B, Σ d]` with the keys of the caller's features."""
        return KeyedTensor(keys=self._keys, length_per_key=self.dims, values=values)


if find_spec("torchrec.ir") is not None:  # TorchRec's wheel has no serializer of programs
    import torchrec_cce.modules.ir_serializer  # noqa: F401  which adds the collection to it
