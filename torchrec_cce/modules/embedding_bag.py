"""`CCEEmbeddingBagCollection`: TorchRec's `EmbeddingBagCollection` with compressed tables."""

from dataclasses import replace

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_cce.errors import ConfigError
from torchrec_cce.methods.computed import ComputedEmbeddingBagConfig, ComputedTables
from torchrec_cce.modules.collection import CCECollection
from torchrec_cce.modules.combine import Combine
from torchrec_cce.modules.state_names import pooled_weight


class CCEEmbeddingBagCollection(CCECollection, EmbeddingBagCollectionInterface):
    """Pooled embeddings of raw IDs, from tables that may be full, hashed or clustered.

    Three steps: `remap` (raw IDs → rows, on the CPU, no parameters), `ebc` (a stock `EmbeddingBagCollection`, which
    TorchRec shards, fuses, checkpoints and quantizes like any other) and `combine` (columns → the caller's features).
    Tables that are computed and not looked up are in `computed`, and replicated; without others, `ebc` is None.

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
            self._physical = [replace(table, pooling=PoolingType.SUM) for table in self._physical]
        self.ebc = (
            EmbeddingBagCollection(tables=self._physical, is_weighted=self.remap.makes_weights, device=device)
            if self._physical
            else None
        )
        computed = [table for table in tables if isinstance(table, ComputedEmbeddingBagConfig)]
        self.computed = ComputedTables(computed, is_weighted=is_weighted, device=device) if computed else None
        self.combine = Combine(tables, self._physical)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pooled embeddings, `[B, Σ d]` float32 with one key a feature, of bags of raw IDs.

        Raises:
            InvalidIDError: a raw ID outside its table's universe, or not an integer; names feature and value.
        """
        rows = self.remap(features)
        looked_up = [] if self.ebc is None else [self.ebc(rows)]  # under way, if sharded, while others are computed
        pooled: KeyedTensor = self.combine(looked_up + ([] if self.computed is None else [self.computed(rows)]))
        return pooled

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        return self._tables

    def is_weighted(self) -> bool:
        return self._is_weighted

    def weight_name(self, table: str) -> str:
        return pooled_weight(table)
