"""Tables of which every rank has a replica: TorchRec's sharded collection, looked up by loops and kernels of ours.

A replica has a dense gradient, averaged over ranks. FBGEMM's dense kernel sorts the rows of a batch to add it up; the
loops of `kernels.lookup` add where it belongs; so do, on a GPU, the kernels of `kernels.lookup_on_gpu`, from words.
Names, gradients, optimizers and pipelines are TorchRec's.
"""

from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec import KeyedJaggedTensor, PoolingType
from torchrec.distributed.batched_embedding_kernel import BatchedDenseEmbeddingBag, BatchedFusedEmbeddingBag
from torchrec.distributed.embedding_lookup import GroupedPooledEmbeddingsLookup
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, GroupedEmbeddingConfig
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.sharding.dp_sharding import DpPooledEmbeddingSharding
from torchrec.distributed.types import ShardingEnv, ShardingType
from torchrec.modules.embedding_configs import DataType

from torchrec_cce.errors import InvalidIDError
from torchrec_cce.kernels.lookup.layout import FeatureTable, Layout
from torchrec_cce.kernels.lookup.pack import Codes
from torchrec_cce.modules.device_lookup import takes_words
from torchrec_cce.modules.packed_lookup import Replicas
from torchrec_cce.modules.word_lookup import CPU, Place, WordLookup

PACKED = "packed"
"""What we call a kernel of ours, where TorchRec calls it dense."""
_ROW_BITS = 64


class ShardedBags(ShardedEmbeddingBagCollection, Replicas):
    """TorchRec's, whose tables with a replica on each rank are looked up by us, where `takes_words` says so.

    From rows, one by one as they come; or, if all its tables are such, from the words of a `PackedLookup`. A single
    rank looks up others so, too, where nothing is noted for a backward pass: our loops need not train them.
    """

    def _create_lookups(self) -> None:
        self._places: dict[str, Place] = {}
        are_ours = self._device is not None and takes_words(self.device)
        for sharding in self._embedding_shardings:
            if not isinstance(sharding, DpPooledEmbeddingSharding) or not are_ours:
                self._lookups.append(sharding.create_lookup())
                continue
            lookup = _ReplicaLookup(
                sharding._grouped_embedding_configs,
                device=self._device,
                pg=self._env.process_group,
                scale_weight_gradients=False,  # as DpPooledEmbeddingSharding has it
                env=self._env,
            )
            self._places = lookup.places()
            self._lookups.append(lookup)
        self._are_replicas = len(self._places) == len(self._table_names)
        is_alone = self._env.world_size == 1 and _is_cpu(self._device)
        self._kernels = [kernel for lookup in self._lookups for kernel in lookup._emb_modules] if is_alone else []
        self._untrained = _places_in(self._kernels)

    @property
    def device(self) -> torch.device:
        return torch.empty(0, device=self._device).device  # with its index

    @property
    def replicas(self) -> Set[str]:
        """The tables that are looked up so."""
        return self._places.keys()

    def places(self) -> Mapping[str, Place] | None:
        is_seen = self.post_lookup_tracker_fn is not None or self.post_odist_tracker_fn is not None
        found = self._places if self._are_replicas or torch.is_grad_enabled() else self._untrained
        return found if len(found) == len(self._table_names) and not is_seen else None

    def look_up(self, features: KeyedJaggedTensor, lookup: WordLookup, *, weighted: bool) -> torch.Tensor:
        if not self._are_replicas:
            return lookup(features, [_floats(kernel) for kernel in self._kernels], weighted=weighted)
        (replicas,) = self._lookups
        assert isinstance(replicas, DistributedDataParallel)  # which averages gradients of what went through it
        # A single rank has nothing to average, and gradients need not be copied for it.
        through = replicas.module if self._env.world_size == 1 else replicas
        pooled: torch.Tensor = through(features, lookup, weighted)
        return pooled


class _ReplicaLookup(GroupedPooledEmbeddingsLookup):
    """The tables of one collection, in a tensor for each kind of pooling."""

    def _create_embedding_kernel(
        self,
        config: GroupedEmbeddingConfig,
        device: torch.device | None,
        pg: dist.ProcessGroup | None,
        sharding_type: ShardingType | None,
        env: ShardingEnv | None,
    ) -> nn.Module:
        if config.compute_kernel == EmbeddingComputeKernel.DENSE and config.data_type == DataType.FP32:
            return _ReplicaKernel(config, pg, device, sharding_type)
        kernel: nn.Module = super()._create_embedding_kernel(config, device, pg, sharding_type, env)
        return kernel

    def places(self) -> dict[str, Place]:
        """Of each table that our loops train."""
        return _places_in(self._emb_modules)

    def forward(
        self, sparse_features: KeyedJaggedTensor, lookup: WordLookup | None = None, weighted: bool = False
    ) -> torch.Tensor:
        """As TorchRec's, from rows; with a `lookup`, what that finds in the tables."""
        if lookup is None:
            pooled: torch.Tensor = super().forward(sparse_features)
            return pooled
        return lookup(sparse_features, [_floats(kernel) for kernel in self._emb_modules], weighted=weighted)


class _ReplicaKernel(BatchedDenseEmbeddingBag):
    """A dense kernel that does not sort."""

    def __init__(self, config: GroupedEmbeddingConfig, *args: Any) -> None:
        super().__init__(config, *args)
        starts = [start for _, start in _places_in([self]).values()]
        self._rows = RowLookup(config, starts, self.emb_module.weights.device)

    def forward(self, features: KeyedJaggedTensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        weights = features.weights_or_none()
        trains_weights = weights is not None and weights.requires_grad
        is_ours = features.values().dtype in (torch.int64, torch.int32) and not features.variable_stride_per_key()
        if trains_weights or not is_ours:
            pooled: torch.Tensor = super().forward(features, *args, **kwargs)
            return pooled
        # As TorchRec's kernel, which takes the weights that there are.
        return self._rows(features, [_floats(self)], weighted=weights is not None and weights.is_floating_point())


def _places_in(kernels: Iterable[Any]) -> dict[str, Place]:
    """Of tables of float32, each of them whole; those of a fused kernel are in host memory."""
    places: dict[str, Place] = {}
    for number, kernel in enumerate(kernels):
        is_read = isinstance(kernel, _ReplicaKernel) or type(kernel) is BatchedFusedEmbeddingBag
        if is_read and kernel.config.data_type == DataType.FP32:
            starts = kernel.emb_module.weights_physical_offsets  # of a dense kernel, with the end
            tables = kernel.config.embedding_tables
            places |= {table.name: (number, start) for table, start in zip(tables, starts, strict=False)}
    return places


def _floats(kernel: BatchedDenseEmbeddingBag | BatchedFusedEmbeddingBag) -> torch.Tensor:
    """Of all tables of a kernel, [n, 1]."""
    tables = kernel.emb_module
    floats: torch.Tensor = tables.weights if isinstance(kernel, BatchedDenseEmbeddingBag) else tables.weights_host
    return floats.view(-1, 1)


class RowLookup(WordLookup):
    """Of rows, each of which is a word; the features are those of a group of tables, in its order."""

    def __init__(self, config: GroupedEmbeddingConfig, starts: list[int], device: torch.device = CPU) -> None:
        tables = [(i, table) for i, table in enumerate(config.embedding_tables) for _ in table.feature_names]
        self._features = [
            (feature, table.name, table.local_rows)
            for feature, (_, table) in zip(config.feature_names(), tables, strict=True)
        ]
        layout = Layout.of(
            [
                FeatureTable(
                    table=number,
                    source=source,
                    num_columns=1,
                    num_terms=1,
                    bits=_ROW_BITS,
                    width=table.local_cols,
                    table_rows=table.local_rows,
                    column_rows=0,
                    term_rows=0,
                    is_mean=config.pooling == PoolingType.MEAN,
                )
                for source, (number, table) in enumerate(tables)
            ]
        )
        codes = [
            Codes(source=source, first_word=0, bits=_ROW_BITS, num_ids=table.local_rows)
            for source, (_, table) in enumerate(tables)
        ]
        super().__init__(layout, codes, num_sources=len(tables), places=[(0, start) for start in starts], device=device)

    def words(self, ids: torch.Tensor, offsets: torch.Tensor, batch: int) -> torch.Tensor:
        # On a device they are rows of the remap, which are inside their tables, and are words as they are.
        is_there = not ids.is_cpu and ids.device == self.device
        return ids.long().view(1, -1) if is_there else super().words(ids, offsets, batch)

    def refuse(self, number: int, ids: npt.NDArray[np.integer], bounds: npt.NDArray[np.int64]) -> None:
        feature, table, num_rows = self._features[number]
        rows = ids[bounds[number] : bounds[number + 1]]
        bad = int(np.flatnonzero((rows < 0) | (rows >= num_rows))[0])
        raise InvalidIDError(
            f"feature {feature!r}: row {rows[bad]} (position {bad} of its {len(rows)} values) is not in "
            f"0..{num_rows - 1}, the rows of table {table!r}; remap raw IDs by the collection's own remap"
        )


def _is_cpu(device: torch.device | None) -> bool:
    return device is not None and device.type == "cpu"
