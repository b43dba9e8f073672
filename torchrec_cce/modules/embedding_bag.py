"""`CCEEmbeddingBagCollection`: TorchRec's `EmbeddingBagCollection` with compressed tables."""

from dataclasses import replace

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_cce.errors import ConfigError
from torchrec_cce.methods.cce import CCEEmbeddingBagConfig
from torchrec_cce.methods.computed import ComputedEmbeddingBagConfig, ComputedTables
from torchrec_cce.modules.collection import CCECollection
from torchrec_cce.modules.combine import Combine
from torchrec_cce.modules.quantized_rows import QuantizedRows
from torchrec_cce.modules.state_names import codewords_weight, pooled_weight


class CCEEmbeddingBagCollection(CCECollection, EmbeddingBagCollectionInterface):
    """Pooled embeddings of raw IDs, from tables that may be full, hashed or clustered.

    Three steps: `remap` (raw IDs → rows, on the CPU, no parameters), `ebc` (a stock `EmbeddingBagCollection`, which
    TorchRec shards, fuses, checkpoints and quantizes like any other) and `combine` (columns → the caller's features).
    Tables that are computed and not looked up are in `computed`, and replicated; without others, `ebc` is None. The
    codewords of tables with residents, and the rows of these, are stock collections of their own, `codewords` and
    `residents`: while a phase is open, the one is frozen and the other is trained. Rows of int8 numbers, which no stock
    collection trains, are in `quantized_residents`.

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
        with_residents = [t for t in tables if isinstance(t, CCEEmbeddingBagConfig) and t.residents is not None]
        frozen = {table.name for table in with_residents}

        def stock(tables: list[EmbeddingBagConfig]) -> EmbeddingBagCollection | None:
            weighted = self.remap.makes_weights
            return EmbeddingBagCollection(tables=tables, is_weighted=weighted, device=device) if tables else None

        self.ebc = stock([table for name, table in self._physical.items() if name not in frozen])
        self.codewords = stock([table for name, table in self._physical.items() if name in frozen])
        quantized = [table for table in with_residents if not table.has_stock_residents]
        self.residents = stock([table.resident_rows() for table in with_residents if table not in quantized])
        self.quantized_residents = QuantizedRows(quantized, device=device) if quantized else None
        computed = [table for table in tables if isinstance(table, ComputedEmbeddingBagConfig)]
        self.computed = ComputedTables(computed, is_weighted=is_weighted, device=device) if computed else None
        self.combine = Combine(tables, list(self._physical.values()))

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pooled embeddings, `[B, Σ d]` float32 with one key a feature, of bags of raw IDs.

        Raises:
            InvalidIDError: a raw ID outside its table's universe, or not an integer; names feature and value.
        """
        rows = self.remap(features)
        # Under way, if sharded, while others are computed.
        looked_up = [] if self.ebc is None else [self.ebc(rows)]
        residents = [stock(rows) for stock in (self.residents, self.quantized_residents) if stock is not None]
        if self.codewords is not None:
            looked_up.append(self._look_codewords_up(rows))
        if self.computed is not None:
            looked_up.append(self.computed(rows))
        pooled: KeyedTensor = self.combine(looked_up, residents)
        return pooled

    def _look_codewords_up(self, rows: KeyedJaggedTensor) -> KeyedTensor:
        """Those of tables with residents: frozen while these learn."""
        assert self.codewords is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.remap.phase_is_open):
            columns: KeyedTensor = self.codewords(rows)
            columns.values()  # a sharded lookup ends here, so that none of it is noted for a backward pass
        return columns

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        return self._tables

    def is_weighted(self) -> bool:
        return self._is_weighted

    def weight_name(self, table: str) -> str:
        return codewords_weight(table) if table in self.remap.resident_tables() else pooled_weight(table)
