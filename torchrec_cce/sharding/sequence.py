"""What TorchRec may do with the tables inside a `CCEEmbeddingCollection`, and the dense kernel that it needs there."""

from itertools import accumulate

import torch
from torch.nn import functional
from torchrec import EmbeddingCollection, KeyedJaggedTensor
from torchrec.distributed.batched_embedding_kernel import BatchedDenseEmbedding
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.types import ParameterSharding, ShardingEnv, ShardingType

from torchrec_cce.sharding.sharder import check_kernels


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
            self.fused_params,
            device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            use_index_dedup=self._use_index_dedup,
            module_fqn=module_fqn,
        )


class _ShardedSequences(ShardedEmbeddingCollection):
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
