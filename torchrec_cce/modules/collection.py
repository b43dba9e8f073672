"""What pooled and unpooled collections have in common: tables with their maps, published, restored and reclustered."""

import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.fx import symbolic_trace
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_cce.clustering.fold import ResidentRows
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.errors import ConfigError, MapMismatchError
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.methods.cce import CCEConfig
from torchrec_cce.methods.compositional import CompositionalConfig
from torchrec_cce.methods.computed import ComputedEmbeddingBagConfig, ComputedTable
from torchrec_cce.methods.residents import NO_RESIDENTS
from torchrec_cce.modules.guarded import Guarded
from torchrec_cce.modules.inputs import Inputs
from torchrec_cce.modules.quantized_rows import QuantizedStore, QuantizedTable
from torchrec_cce.modules.recluster import (
    ParameterStore,
    ResidentStore,
    TableReport,
    TableRows,
    check_names,
    recluster_rows,
)
from torchrec_cce.modules.remap import Remap
from torchrec_cce.modules.residents import rows_given
from torchrec_cce.modules.snapshots import snapshot_of
from torchrec_cce.modules.state_names import computed_prefix, quantized_rows
from torchrec_cce.modules.stock_state import take_stock_tables
from torchrec_cce.modules.table_weight import table_weight, whole_table_weight


class CCECollection(Guarded):
    """Tables that may be full, hashed or clustered, in stock modules that a subclass makes, and their maps in `remap`.

    Args:
        tables: one configuration per table. One without features gets a feature of its own name, as TorchRec does.
        kind: what each configuration must be.
        is_weighted: whether per-sample weights go to the trained tables.

    Raises:
        ConfigError: a table of another kind, or two tables of one name.
    """

    def __init__(
        self, tables: list[BaseEmbeddingConfig], *, kind: type[BaseEmbeddingConfig], is_weighted: bool
    ) -> None:
        super().__init__()
        names = [table.name for table in tables]
        for table in tables:
            if not isinstance(table, kind):
                raise ConfigError(
                    f"table {table.name!r} is described by a {type(table).__name__}; {type(self).__name__} takes "
                    f"{kind.__name__} and what derives from it"
                )
            if names.count(table.name) > 1:
                raise ConfigError(f"there are {names.count(table.name)} tables of the name {table.name!r}")
            if not table.feature_names:
                table.feature_names = [table.name]
        self._tables = tables
        self._physical = {
            table.name: table.physical() if isinstance(table, CompositionalConfig) else table
            for table in tables
            if not isinstance(table, ComputedEmbeddingBagConfig)
        }
        # The order matters: `load_state_dict` checks the maps in `remap` before it overwrites a weight, and a subclass
        # adds its trained tables after.
        self.remap = Remap(tables, is_weighted=is_weighted)
        self.register_load_state_dict_pre_hook(take_stock_tables)  # type: ignore[no-untyped-call]
        self._own_remap = (self.remap,)
        self._inputs = Inputs(self.remap)

    @abstractmethod
    def residents_name(self, config: CCEConfig) -> str:
        """The name of the rows of a table's residents in `state_dict`, sharded or not, if they are a stock table."""

    def _codewords_learn(self) -> torch.set_grad_enabled:
        """Codewords of tables with residents are looked up in this context, and waited for: they are frozen while a
        phase is open, and then nothing of the lookup is noted for a backward pass.
        """
        return torch.set_grad_enabled(torch.is_grad_enabled() and not self.phase_is_open)

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script` takes in place of the collection, alone or in a model: its symbolic trace."""
        warnings.warn(
            "torch.jit.script takes the symbolic trace of a collection, and leaves it in the collection's place in the "
            "model that is scripted; script copy.deepcopy(model) if the model is to be used afterwards",
            stacklevel=2,
        )
        return symbolic_trace(self)

    @property
    def phase_is_open(self) -> bool:
        """Whether some table has residents now, also while a training pipeline has batches in flight."""
        return self._own_remap[0].phase_is_open

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        return next(chain(self.parameters(), self.buffers())).device  # buffers, once they are quantized

    def _modules_of_tables(self) -> nn.ModuleDict:
        """Table → the module that has its weights; a new dict each time, which is no part of this module."""
        paths = {
            table.name: computed_prefix(table.name)
            if isinstance(table, ComputedEmbeddingBagConfig)
            else self.weight_name(table.name)
            for table in self._tables
        }
        return nn.ModuleDict({name: self.get_submodule(path.rpartition(".")[0]) for name, path in paths.items()})

    def reset_parameters(self) -> None:
        """Draw all weights anew from each table's `init_fn`; the maps stay."""
        self.outdated.clear()
        for name, table in self._physical.items():
            weight = self._parameter(self.weight_name(name))
            if not weight.is_meta:
                table.init_fn(weight)
        for table in self.configs_with_residents():
            if table.has_stock_residents:
                rows = self._parameter(self.residents_name(table))
                if not rows.is_meta:
                    nn.init.zeros_(rows)
        for module in self.modules():
            if isinstance(module, ComputedTable | QuantizedTable):
                module.reset_parameters()

    def configs(self) -> list[BaseEmbeddingConfig]:
        """All tables, as they were described."""
        return list(self._tables)

    def cce_configs(self) -> list[CCEConfig]:
        """The tables that have a map."""
        return [table for table in self._tables if isinstance(table, CCEConfig)]

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
        self._got_another_map(table)

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
            frequencies: table → [num_ids] int64, how often the raw ID at each position of the map was seen.

        Raises:
            ConfigError: the tables are sharded or on the meta device, or `frequencies` has another shape.
        """
        self.check_weights()
        reports, frequencies = reports or {}, frequencies or {}
        return {
            table.name: snapshot_of(
                table,
                self.pointer_map(table.name),
                weights=self._store(table.name).read().weights,
                frequencies=frequencies.get(table.name),
                report=reports.get(table.name),
            )
            for table in self.cce_configs()
        }

    def restore(self, tables: Mapping[str, TableSnapshot]) -> None:
        """Take over the maps of `tables` together with the weights they come with; without weights, the maps alone.

        A table that does not use its helper leaves the helper's codewords behind.

        Raises:
            MapMismatchError: `tables` are not those of the CCE tables here, or have other sizes. Nothing has changed.
            ConfigError: there are weights, and the tables are sharded or on the meta device.
        """
        self.check_tables(tables)
        configs = {table.name: table for table in self.cce_configs()}
        weighted = {name: table.weights for name, table in tables.items() if table.weights is not None}
        stores = {name: self._store(name) for name in weighted}
        for name, weights in weighted.items():
            stores[name].write(TableRows(weights=configs[name].used_codewords(np.array(weights)), states={}))
        for name, table in tables.items():
            self.attach_pointer_map(name, table.pointer_map)

    def check_tables(self, tables: Mapping[str, TableSnapshot]) -> None:
        """Raise MapMismatchError unless `tables` can be restored here."""
        mine = {table.name: table for table in self.cce_configs()}
        if mine.keys() != tables.keys():
            raise MapMismatchError(f"the maps are of tables {sorted(tables)}, the module has {sorted(mine)}")
        for name, table in tables.items():
            self.remap.check_pointer_map(name, table.pointer_map)
            if table.embedding_dim != mine[name].embedding_dim:
                raise MapMismatchError(
                    f"table {name!r} has embedding_dim={mine[name].embedding_dim}; the map, "
                    f"{table.pointer_map.identity}, comes with codewords for {table.embedding_dim}"
                )

    def recluster(
        self,
        *,
        seed: int,
        optimizer: torch.optim.Optimizer | None = None,
        frequencies: Mapping[str, npt.NDArray[np.integer]] | None = None,
        settings: ReclusterConfig | None = None,
    ) -> dict[str, TableReport]:
        """Cluster the current embeddings of every CCE table: new codebooks, pointers and helper hashes (Algorithm 3).

        Where a table has residents, their rows are folded into its codewords and pointers, and their phase ends.

        All tables are computed before the first is changed, so that an error leaves the collection as it was.

        Args:
            seed: of sampling, k-means and the fresh helper hash. Every clustering derives its own from it, so that the
                same `seed` may be passed each time.
            optimizer: the one that trains these weights. Its per-row state (moments, accumulators) is carried over: a
                codebook row gets the mean over its member IDs of the mean of their two old rows, a helper row zero.
            frequencies: table → [num_ids] counts, one a position of its map; k-means weighs IDs by them. IDs that never
                occurred do not move centroids, but get pointers all the same.
            settings: of k-means and of the helper's new start.

        Returns:
            One report a CCE table.

        Raises:
            ClusteringError: a table holds NaN or infinite values.
            ConfigError: `frequencies` of an unknown table or of a wrong length; an optimizer that does not train the
                tables; tables on the meta device, or sharded (use
                `torchrec_cce.sharding.recluster_sharded` there).
        """
        frequencies = self._checked(frequencies)
        tables = self.cce_configs()
        stores = {table.name: self._store(table.name, optimizer) for table in tables}
        results = {
            table.name: recluster_rows(
                table,
                self.pointer_map(table.name),
                stores[table.name].read(),
                seed=seed,
                frequencies=frequencies.get(table.name),
                settings=settings or ReclusterConfig(),
                residents=self._resident_rows(table, optimizer),
            )
            for table in tables
        }
        for name, (new_map, rows, _) in results.items():
            stores[name].write(rows)
            self.attach_pointer_map(name, new_map)
        return {name: report for name, (_, _, report) in results.items()}

    def admit(
        self,
        *,
        seed: int,
        optimizer: torch.optim.Optimizer | None = None,
        frequencies: Mapping[str, npt.NDArray[np.integer]] | None = None,
    ) -> None:
        """Begin a phase of every table with residents: give the IDs that are frequent and have waited a private row.

        Until the next `recluster`, the codewords of these tables are frozen. Where a table is `first_come`, IDs that
        were not seen get no row; see `top_up`.

        Args:
            seed: every phase derives its own from it, so that the same may be passed each time.
            optimizer: the one that trains the rows, whose state of them starts again at zero.
            frequencies: table → [num_ids] counts, one a position of its map; see `admitted_ages`.

        Raises:
            ConfigError: no table has residents, or a phase is open already; `frequencies` of an unknown table; what
                `admitted_ages` raises.
        """
        self.check_no_phase_is_open()
        self._give_rows(self.configs_with_residents(), seed, self._checked(frequencies), optimizer)

    def top_up(self, *, seed: int, frequencies: Mapping[str, npt.NDArray[np.integer]]) -> None:
        """Give the free rows of the open phase to the most frequent IDs that were seen and never had one.

        Who has a row keeps it, with all that it has learned.

        Args:
            seed: as of `admit`.
            frequencies: table → [num_ids] counts so far, one a position of its map. Other tables stay as they are.

        Raises:
            ConfigError: no table has residents, or no phase is open; what `admit` raises of frequencies.
        """
        self.check_a_phase_is_open()
        frequencies = self._checked(frequencies)
        tables = [table for table in self.configs_with_residents() if table.name in frequencies]
        self._give_rows([table for table in tables if self.remap.free_rows(table.name)], seed, frequencies)

    def _give_rows(
        self,
        tables: Sequence[CCEConfig],
        seed: int,
        frequencies: Mapping[str, npt.NDArray[np.integer]],
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        given = {
            config.name: rows_given(
                config,
                self.pointer_map(config.name),
                self._store(config.name).read().weights,
                self.remap.residency(config.name),
                self._residents_store(config, optimizer),
                frequencies=frequencies.get(config.name),
                seed=seed,
            )
            for config in tables
        }
        for name, (residency, write_rows) in given.items():
            write_rows()
            self.remap.attach_residency(name, residency)

    def _checked(
        self, frequencies: Mapping[str, npt.NDArray[np.integer]] | None
    ) -> Mapping[str, npt.NDArray[np.integer]]:
        frequencies = frequencies or {}
        check_names(frequencies, self.cce_tables())
        self.check_weights()
        return frequencies

    def configs_with_residents(self) -> list[CCEConfig]:
        """The tables that have residents, now or at times."""
        return [table for table in self.cce_configs() if table.residents is not None]

    def check_no_phase_is_open(self) -> None:
        """Raise ConfigError unless a phase of residents may begin."""
        if not self.configs_with_residents():
            raise ConfigError(NO_RESIDENTS)
        if self.remap.phase_is_open:
            raise ConfigError("a phase of residents is open; recluster first, which folds their rows")

    def check_a_phase_is_open(self) -> None:
        """Raise ConfigError unless tables have residents now."""
        if not self.remap.phase_is_open:
            raise ConfigError("no phase of residents is open, whose rows could be given; admit first")

    def _resident_rows(self, table: CCEConfig, optimizer: torch.optim.Optimizer | None) -> ResidentRows | None:
        """What is to be folded, if a phase of `table` is open."""
        if table.residents is None or not self.remap.residency(table.name).is_open:
            return None
        return self._residents_store(table, optimizer).learned(self.remap.residency(table.name))

    def quantized_store(self, config: CCEConfig) -> QuantizedStore | None:
        """The rows of a table's residents, if they are float16 or int8; if not, they are a stock table, or there are
        none."""
        if config.residents is None or config.has_stock_residents:
            return None
        return QuantizedStore(self.get_submodule(quantized_rows(config.resident_table)))

    def _store(self, table: str, optimizer: torch.optim.Optimizer | None = None) -> ParameterStore:
        return ParameterStore(whole_table_weight(self, self.weight_name(table)), optimizer, table=table)

    def _residents_store(self, config: CCEConfig, optimizer: torch.optim.Optimizer | None = None) -> ResidentStore:
        stock: ResidentStore | None = self.quantized_store(config)
        if stock is None:
            weight = whole_table_weight(self, self.residents_name(config))
            stock = ParameterStore(weight, optimizer, table=config.resident_table)
        return stock

    def _parameter(self, name: str) -> nn.Parameter:
        """A stock table; see `table_weight`."""
        return table_weight(self, name)
