"""`CCEEmbeddingBagCollection`: TorchRec's `EmbeddingBagCollection` with compressed tables."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_cce.clustering.recluster import ReclusterConfig
from torchrec_cce.config import CCEEmbeddingBagConfig, CompositionalEmbeddingBagConfig
from torchrec_cce.errors import ConfigError, MapMismatchError
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.modules.combine import Combine
from torchrec_cce.modules.recluster import ParameterStore, TableReport, TableRows, recluster_rows
from torchrec_cce.modules.remap import Remap
from torchrec_cce.modules.snapshot import snapshot_of


class CCEEmbeddingBagCollection(EmbeddingBagCollectionInterface):
    """Pooled embeddings of raw IDs, from tables that may be full, hashed or clustered.

    Three steps: `remap` (raw IDs → rows, on the CPU, no parameters), `ebc` (a stock `EmbeddingBagCollection`, which
    TorchRec shards, fuses, checkpoints and quantizes like any other) and `combine` (columns → the caller's features).

    Args:
        tables: `EmbeddingBagConfig` for a full table, `CompositionalEmbeddingBagConfig` for a hashed one,
            `CCEEmbeddingBagConfig` for a clustered one, in any mixture.
        is_weighted: whether the input carries per-sample weights.
        device: of the trained tables. From the meta device they are materialised by `to_empty(device=…)` and
            `reset_parameters()`.

    Raises:
        ConfigError: mean pooling of weighted bags, which TorchRec does not define.

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
        super().__init__()
        for table in tables:
            if is_weighted and table.pooling == PoolingType.MEAN:
                raise ConfigError(
                    f"table {table.name!r}: mean pooling is not defined for weighted bags; use PoolingType.SUM"
                )
            if not table.feature_names:
                table.feature_names = [table.name]
        physical = [t.physical() if isinstance(t, CompositionalEmbeddingBagConfig) else t for t in tables]
        self._tables = tables
        self._is_weighted = is_weighted
        # The order matters: `load_state_dict` checks the maps in `remap` before it overwrites a weight in `ebc`.
        self.remap = Remap(tables, is_weighted=is_weighted)
        self.ebc = EmbeddingBagCollection(tables=physical, is_weighted=is_weighted, device=device)
        self.combine = Combine(tables, physical)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pooled embeddings, `[B, Σ d]` float32 with one key a feature, of bags of raw IDs.

        Raises:
            InvalidIDError: a raw ID outside its table's universe, or not an integer; names feature and value.
        """
        pooled: KeyedTensor = self.combine(self.ebc(self.remap(features)))
        return pooled

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        return self._tables

    def is_weighted(self) -> bool:
        return self._is_weighted

    @property
    def device(self) -> torch.device:
        """Where the trained tables are."""
        device: torch.device = next(self.ebc.parameters()).device
        return device

    def reset_parameters(self) -> None:
        """Draw all weights anew from each table's `init_fn`; the maps stay."""
        for table in self.ebc.embedding_bag_configs():
            weight = self.ebc.embedding_bags[table.name].weight
            if not weight.is_meta:
                table.init_fn(weight)

    def cce_tables(self) -> list[str]:
        """The names of the tables that have a map."""
        return self.remap.cce_tables()

    def pointer_map(self, table: str) -> PointerMap:
        """The index-pointer map of a CCE table: Arrow pointers, hash functions, generation, digest.

        Raises:
            ConfigError: `table` is not a CCE table; the message lists those that are.
        """
        return self.remap.pointer_map(table)

    def attach_pointer_map(self, table: str, pointer_map: PointerMap) -> None:
        """Use `pointer_map`, e.g. one read from a file, for `table`. Weights trained with it are then loaded next.

        Raises:
            MapMismatchError: the map is of other sizes than the table.
        """
        self.remap.attach_pointer_map(table, pointer_map)

    def unseen_ids(self) -> dict[str, int]:
        """CCE table → how many raw IDs were looked up, since its map was attached, that the map does not know."""
        return self.remap.unseen_ids()

    def snapshot(
        self,
        reports: Mapping[str, TableReport] | None = None,
        frequencies: Mapping[str, npt.NDArray[np.int64]] | None = None,
    ) -> dict[str, TableSnapshot]:
        """Maps and weights of all CCE tables, to be published. The weights are copied.

        Args:
            reports: of the clustering that made the maps, whose entropies and objective are kept with them.
            frequencies: table → [num_ids] int64, how often the raw ID of each row of the map was seen.

        Raises:
            ConfigError: the tables are sharded or on the meta device, or `frequencies` has another shape.
        """
        ebc = self._own_tables()
        reports, frequencies = reports or {}, frequencies or {}
        tables = {}
        for table in self._tables:
            if not isinstance(table, CCEEmbeddingBagConfig):
                continue
            weights = ParameterStore(ebc.embedding_bags[table.name].weight, None, table=table.name).read().weights
            report = reports.get(table.name)
            tables[table.name] = snapshot_of(
                table,
                self.pointer_map(table.name),
                weights=weights,
                frequencies=frequencies.get(table.name),
                entropies=() if report is None else report.entropies,
                objective=None if report is None else report.objective,
            )
        return tables

    def restore(self, tables: Mapping[str, TableSnapshot]) -> None:
        """Take over the maps of `tables` together with the weights they come with; without weights, the maps alone.

        Raises:
            MapMismatchError: `tables` are not those of the CCE tables here, or have other sizes. Nothing has changed.
            ConfigError: there are weights, and the tables are sharded or on the meta device.
        """
        mine = {table.name: table for table in self._tables if isinstance(table, CCEEmbeddingBagConfig)}
        if mine.keys() != tables.keys():
            raise MapMismatchError(f"the maps are of tables {sorted(tables)}, the module has {sorted(mine)}")
        for name, table in tables.items():
            self.remap.check_pointer_map(name, table.pointer_map)
            if table.embedding_dim != mine[name].embedding_dim:
                raise MapMismatchError(
                    f"table {name!r} has embedding_dim={mine[name].embedding_dim}; the map, "
                    f"{table.pointer_map.identity}, comes with words for {table.embedding_dim}"
                )
        weighted = {name: table.weights for name, table in tables.items() if table.weights is not None}
        stores = {}
        if weighted:
            bags = self._own_tables().embedding_bags
            stores = {name: ParameterStore(bags[name].weight, None, table=name) for name in weighted}
        for name, weights in weighted.items():
            stores[name].write(TableRows(weights=np.array(weights), states={}))
        for name, table in tables.items():
            self.attach_pointer_map(name, table.pointer_map)

    def recluster(
        self,
        *,
        seed: int,
        optimizer: torch.optim.Optimizer | None = None,
        frequencies: Mapping[str, npt.NDArray[np.integer]] | None = None,
        settings: ReclusterConfig | None = None,
    ) -> dict[str, TableReport]:
        """Cluster the current embeddings of every CCE table: new codebooks, pointers and helper hashes (Algorithm 3).

        All tables are computed before the first is changed, so that an error leaves the collection as it was.

        Args:
            seed: of sampling, k-means and the fresh helper hash. Every clustering derives its own from it, so that the
                same `seed` may be passed each time.
            optimizer: the one that trains these weights. Its per-row state (moments, accumulators) is carried over: a
                codebook row gets the mean over its member IDs of the mean of their two old rows, a helper row zero.
            frequencies: table → [num_ids] counts, one a row of its map; k-means weighs IDs by them. IDs that never
                occurred do not move centroids, but get pointers all the same.
            settings: of k-means and of the helper's new start.

        Returns:
            One report a CCE table.

        Raises:
            ClusteringError: a table holds NaN or infinite values.
            ConfigError: `frequencies` of an unknown table or of a wrong length; an optimizer that does not train the
                tables; tables on the meta device, or sharded (use `torchrec_cce.sharding.recluster` there).
        """
        ebc = self._own_tables()
        frequencies = frequencies or {}
        tables = [table for table in self._tables if isinstance(table, CCEEmbeddingBagConfig)]
        unknown = set(frequencies) - {table.name for table in tables}
        if unknown:
            raise ConfigError(f"frequencies of {sorted(unknown)}, which are not CCE tables of this collection")
        stores = {
            table.name: ParameterStore(ebc.embedding_bags[table.name].weight, optimizer, table=table.name)
            for table in tables
        }
        results = {
            table.name: recluster_rows(
                table,
                self.pointer_map(table.name),
                stores[table.name].read(),
                seed=seed,
                frequencies=frequencies.get(table.name),
                settings=settings or ReclusterConfig(),
            )
            for table in tables
        }
        for name, (new_map, rows, _) in results.items():
            stores[name].write(rows)
            self.attach_pointer_map(name, new_map)
        return {name: report for name, (_, _, report) in results.items()}

    def _own_tables(self) -> EmbeddingBagCollection:
        """The trained tables, as long as no wrapper has spread them over ranks."""
        if not isinstance(self.ebc, EmbeddingBagCollection):
            raise ConfigError("the tables are sharded; use torchrec_cce.sharding, which gathers them from all ranks")
        return self.ebc
