"""What TorchRec may do with the tables inside a `CCEEmbeddingBagCollection`."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import nn
from torch.nn import functional
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, KeyedJaggedTensor, PoolingType
from torchrec.distributed.batched_embedding_kernel import BatchedDenseEmbedding
from torchrec.distributed.embedding import (
    EmbeddingCollectionContext,
    EmbeddingCollectionSharder,
    ShardedEmbeddingCollection,
)
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.types import ModuleSharder, ParameterSharding, QuantizedCommCodecs, ShardingEnv, ShardingType
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_cce.errors import ConfigError
from torchrec_cce.modules.bags import members_of
from torchrec_cce.sharding.replicas import ShardedBags

FUSED_WIDTH = 4
"""FBGEMM's fused kernels read rows of a multiple of 4 floats."""
_BY_ROWS: tuple[str, ...] = (ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value)
SHARDING_TYPES = (ShardingType.DATA_PARALLEL.value, ShardingType.TABLE_WISE.value, *_BY_ROWS)


class CCEEmbeddingBagCollectionSharder(EmbeddingBagCollectionSharder):
    """The stock sharder with the placements that train any table as one process would.

    Tables of which each CPU has a replica are looked up by our loops, see `ShardedBags`. A row outside its table is an
    error on a CPU; TorchRec would read row 0 instead.

    On the CPU, too, tables may be split by rows, which gloo carries out and TorchRec does not list. On no device are
    they split by columns: rowwise Adagrad keeps one momentum a row, and would keep one a row of every shard.
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:  # noqa: ARG002  the same on all
        return list(SHARDING_TYPES)

    def shard(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedEmbeddingBagCollection:
        """Shard `module` as the plan says.

        Raises:
            ConfigError: the plan wants a fused kernel for a table whose rows it cannot read, or pools a feature in two
                ways that TorchRec confuses.
        """
        tables = module.embedding_bag_configs()
        check_kernels(tables, params)
        sharded = ShardedBags(
            module,
            params,
            env,
            _checked_once(self.fused_params, device),
            device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
            sharded_module_order_overwrite=self._sharded_module_order_overwrite,
        )
        _divide_only_means(sharded, tables, params)
        return sharded


def _divide_only_means(
    sharded: ShardedEmbeddingBagCollection, tables: list[EmbeddingBagConfig], params: dict[str, ParameterSharding]
) -> None:
    """Note the features of tables that are not split by rows among those that TorchRec must not divide.

    Means of a table that is split by rows are sums over ranks, divided by the bags' lengths afterwards. TorchRec then
    divides all features of the collection, save the sums that it has noted, which are of tables split by rows, too.
    """
    divided = {
        feature
        for table in tables
        if table.pooling == PoolingType.MEAN and params[table.name].sharding_type in _BY_ROWS
        for feature in table.feature_names
    }
    for table in tables:
        if params[table.name].sharding_type in _BY_ROWS and table.pooling == PoolingType.MEAN:
            continue
        confused = divided.intersection(table.feature_names)
        if confused:
            raise ConfigError(
                f"features {sorted(confused)} of table {table.name!r} are also mean-pooled by a table that is split by "
                "rows; TorchRec cannot do both. Replicate that table, or place it on a rank (table_wise)"
            )
        if params[table.name].sharding_type not in _BY_ROWS:
            sharded._pooling_type_to_rs_features[PoolingType.SUM.value].extend(table.feature_names)


def check_kernels(tables: Sequence[BaseEmbeddingConfig], params: Mapping[str, ParameterSharding]) -> None:
    """Raise ConfigError if a plan wants a fused kernel for a table whose rows it cannot read."""
    for table in tables:
        kernel = params[table.name].compute_kernel
        if kernel != EmbeddingComputeKernel.DENSE.value and not has_fused_kernel(table.embedding_dim):
            raise ConfigError(
                f"table {table.name!r}: the plan has kernel {kernel!r} for rows of {table.embedding_dim} floats; "
                f"FBGEMM's fused kernels need a multiple of {FUSED_WIDTH}. Replicate the table (data_parallel, "
                "kernel 'dense'), as CCEShardingPlanner does, or give it fewer columns"
            )


def _checked_once(fused_params: dict[str, Any] | None, device: torch.device | None) -> dict[str, Any]:
    """The arguments of FBGEMM's fused kernels, which on a CPU check rows themselves, and raise an error.

    The pass before them, which replaces bad rows by row 0, takes a tenth of a small step.
    """
    is_cpu = device is not None and device.type == "cpu"
    return ({"bounds_check_mode": BoundsCheckMode.NONE} if is_cpu else {}) | (fused_params or {})


def has_fused_kernel(width: int) -> bool:
    """Whether FBGEMM has a fused kernel for rows of `width` floats. All sharding but data-parallel needs one."""
    return width % FUSED_WIDTH == 0


class CCEEmbeddingCollectionSharder(EmbeddingCollectionSharder):
    """The stock sharder of sequence embeddings with the placements that train any table as one process would.

    Data-parallel tables may be of any width, on the CPU too, where TorchRec pools them by mistake. No table is split by
    columns: rowwise Adagrad keeps one momentum a row, and would keep one a row of every shard.
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:
        types: list[str] = super().sharding_types(compute_device_type)
        return [kind for kind in types if kind != ShardingType.COLUMN_WISE.value]

    def shard(
        self,
        module: EmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedEmbeddingCollection:
        """Shard `module` as the plan says.

        Raises:
            ConfigError: the plan wants a fused kernel for a table whose rows it cannot read.
        """
        check_kernels(module.embedding_configs(), params)
        return _ShardedSequences(
            module,
            params,
            env,
            _checked_once(self.fused_params, device),
            device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            use_index_dedup=self._use_index_dedup,
            module_fqn=module_fqn,
        )


class _ShardedSequences(ShardedEmbeddingCollection):
    """Data-parallel sequences, and those of a variable batch, as on the CPU TorchRec does not train them."""

    def _compute_sequence_vbe_context(
        self, ctx: EmbeddingCollectionContext, unpadded_features: KeyedJaggedTensor
    ) -> None:
        """Note how embeddings are repeated by `inverse_indices`: by indices, as those of deduplicated IDs are.

        The operator by which TorchRec does it on the CPU has no gradient.
        """
        super()._compute_sequence_vbe_context(ctx, unpadded_features)
        deduplicated = bool(ctx.reverse_indices)
        for i, repeats in enumerate(ctx.seq_vbe_ctx):
            members = members_of(repeats.unpadded_lengths, repeats.recat)
            given = ctx.input_features[i] if deduplicated else ctx.sharding_contexts[i].features_before_input_dist
            repeated = KeyedJaggedTensor(
                keys=given.keys(), values=given.values()[members], lengths=repeats.reindexed_lengths.flatten()
            )
            if deduplicated:
                ctx.input_features[i], ctx.reverse_indices[i] = repeated, ctx.reverse_indices[i][members]
            else:
                ctx.input_features.append(repeated)
                ctx.reverse_indices.append(members)
        ctx.seq_vbe_ctx = []

    def _create_lookups(self) -> None:
        super()._create_lookups()
        for lookup in self._lookups:
            for i, kernel in enumerate(lookup._emb_modules):
                if isinstance(kernel, BatchedDenseEmbedding):
                    lookup._emb_modules[i] = _DenseSequences(kernel.config, kernel._pg, self._device)


class _DenseSequences(BatchedDenseEmbedding):
    """Looks up without FBGEMM, whose dense kernel on the CPU returns sums of bags although it is told not to pool."""

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        # The tables of a group are of one width and lie one after another.
        weights = self.emb_module.weights.view(-1, self._local_cols[0])
        first_rows = [0, *accumulate(self._local_rows)]
        starts = torch.tensor([first_rows[table] for table in self._feature_table_map], device=weights.device)
        counts = torch.tensor(features.length_per_key(), device=weights.device)
        rows = features.values().long() + starts.repeat_interleave(counts, output_size=len(features.values()))
        return functional.embedding(rows, weights).float()


def get_cce_sharders(
    *,
    fused_params: dict[str, Any] | None = None,
    qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
) -> list[ModuleSharder[nn.Module]]:
    """The sharders for a planner and a `DistributedModelParallel` of a model with CCE collections, on CPU or CUDA.

    Tables of plain `EmbeddingBagCollection`s and `EmbeddingCollection`s in the same model are sharded by them, too.

    Args:
        fused_params: arguments of FBGEMM's fused kernels, as of the stock sharders.
        qcomm_codecs_registry: quantised communication, as of the stock sharders.
    """
    kinds = (CCEEmbeddingBagCollectionSharder, CCEEmbeddingCollectionSharder)
    return [kind(fused_params=fused_params, qcomm_codecs_registry=qcomm_codecs_registry) for kind in kinds]
