"""`Footprint`: the bytes that embeddings take while they train, by formulas."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torchrec import EmbeddingBagConfig
from torchrec.modules.embedding_configs import DATA_TYPE_NUM_BITS

from torchrec_cce.methods.cce import CCEEmbeddingBagConfig
from torchrec_cce.methods.compositional import CompositionalEmbeddingBagConfig
from torchrec_cce.methods.computed import ComputedEmbeddingBagConfig
from torchrec_cce.methods.registry import Method
from torchrec_cce.training.config import RunConfig
from torchrec_cce.training.config_file import read_run_config

_VALUES_A_WEIGHT = {"sgd": 0, "rowwise_adagrad": 0, "adagrad": 1, "adam": 2, "adamw": 2}
"""Optimizer → float32 values of its state for each weight. Rowwise Adagrad has one for each row."""
_STATE_BYTES = 4
_FREQUENCY_BYTES = 8
_INT8_SCALARS = 16
"""Of a table's int8 rows: what 1 stands for, and the number of updates."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What is held in all memories together, the most of each kind; what ranks have replicas or parts of counts once.

    What only a batch or a clustering needs is not in it: rows that were looked up, gradients (of replicated tables they
    are as large as the tables), points of k-means. Nor are vocabularies, and an optimizer's counters of steps.
    """

    tables: int = 0
    """Trained tables, and what computed tables have beside their weights."""
    optimizer: int = 0
    """The state of their optimizer."""
    residents: int = 0
    """Private rows and the state of their optimizer; which IDs have one, and since when."""
    pointers: int = 0
    """Of maps."""
    frequencies: int = 0

    @property
    def total(self) -> int:
        return self.tables + self.optimizer + self.residents + self.pointers + self.frequencies

    @classmethod
    def sum_of(cls, footprints: Iterable["Footprint"]) -> "Footprint":
        found = list(footprints)
        return cls(
            tables=sum(each.tables for each in found),
            optimizer=sum(each.optimizer for each in found),
            residents=sum(each.residents for each in found),
            pointers=sum(each.pointers for each in found),
            frequencies=sum(each.frequencies for each in found),
        )


def footprints(config: RunConfig, method: Method | None = None) -> dict[str, Footprint]:
    """Table → its footprint in a run, or as it would be with another `method`."""
    return {table.name: _footprint(table, config) for table in config.table_configs(method)}


def peak_training_bytes(config: RunConfig) -> int:
    """The most that a run and those that it derives from take: a table that is quantized was trained in full.

    Raises:
        ConfigError: the folder of a run that it derives from holds none.
    """
    own = Footprint.sum_of(footprints(config).values()).total
    if config.derive is None:
        return own
    return max(own, peak_training_bytes(read_run_config(Path(config.derive.run))))


@dataclass(frozen=True, kw_only=True)
class CachedTables:
    """Bytes of full tables that are trained in host memory, behind a cache on the device (UVM caching of FBGEMM)."""

    device_bytes: int
    """Cached rows; which these are, and since when (16 bytes a cached row); 4 bytes a row to find them by."""
    host_bytes: int
    """All rows and the state of their optimizer."""


CACHED_SHARE = 0.2
"""Of the rows that TorchRec caches if nothing is said."""


def cached_tables(config: RunConfig, share: float = CACHED_SHARE) -> CachedTables:
    """What the full tables of a run would take with a `share` of their rows in the cache; all ranks together."""
    full = footprints(config, "full").values()
    rows = sum(table.num_embeddings for table in config.tables.values())
    cached = share * (sum(each.tables for each in full) + 16 * rows)
    return CachedTables(
        device_bytes=round(cached) + 4 * rows, host_bytes=sum(each.tables + each.optimizer for each in full)
    )


def _footprint(table: EmbeddingBagConfig, config: RunConfig) -> Footprint:
    value_bytes = DATA_TYPE_NUM_BITS[table.data_type] // 8
    rows, width = table.num_embeddings, table.embedding_dim
    optimizer, beside = config.optimizer.embedding, 0
    if isinstance(table, CompositionalEmbeddingBagConfig):
        stock = table.physical()
        rows, width = stock.num_embeddings, stock.embedding_dim
    elif isinstance(table, ComputedEmbeddingBagConfig):
        beside = table.pointer_bytes
        if table.has_rows:
            rows = table.num_physical_parameters // width
        else:
            rows, width = 1, table.num_physical_parameters
            optimizer = "adagrad" if optimizer == "rowwise_adagrad" else optimizer
    is_clustered = isinstance(table, CCEEmbeddingBagConfig)
    counts = is_clustered and (config.recluster.weigh_by_frequency or table.residents is not None)
    registry = config.registry
    has_pointers = (
        config.recluster.ct > 0
        or config.derive is not None
        or registry.start is not None
        or registry.watch_every is not None
    )
    n = table.num_embeddings
    return Footprint(
        tables=value_bytes * rows * width + beside,
        optimizer=_state_bytes(optimizer, rows, width),
        residents=_resident_bytes(table, optimizer) if is_clustered else 0,
        pointers=n * table.pointer_format.num_bytes if is_clustered and has_pointers else 0,
        frequencies=_FREQUENCY_BYTES * n if counts else 0,
    )


def _state_bytes(optimizer: str, rows: int, width: int) -> int:
    a_row = 1 if optimizer == "rowwise_adagrad" else _VALUES_A_WEIGHT[optimizer] * width
    return _STATE_BYTES * rows * a_row


def _resident_bytes(table: CCEEmbeddingBagConfig, optimizer: str) -> int:
    if table.residents is None:
        return 0
    if not table.has_stock_residents:
        return table.resident_bytes + _INT8_SCALARS
    rows, width = table.max_residents, int(table.embedding_dim)
    stock = 4 * rows * width + _state_bytes(optimizer, rows, width)
    return stock + table.residency_bytes
