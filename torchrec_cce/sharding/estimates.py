"""A plan in figures: where each table is, what it takes and sends; TorchRec's model of a step, and what that lacks."""

import copy
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.filesize import decimal
from torch import nn
from torchrec import EmbeddingBagCollection
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.constants import BIGINT_DTYPE
from torchrec.distributed.planner.perf_models import NoopPerfModel
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    BasicCommsBandwidths,
    CollectiveType,
    PlannerError,
    PlannerErrorType,
    ShardingOption,
)
from torchrec.distributed.types import ModuleSharder, ShardingType

from torchrec_cce.modules.collection import CCECollection
from torchrec_cce.modules.state_names import joined, split_weight
from torchrec_cce.sharding.replicas import PACKED

_COLLECTIVES = {
    ShardingType.DATA_PARALLEL.value: 1,  # gradients
    ShardingType.TABLE_WISE.value: 5,  # sizes, bag lengths, rows, embeddings, gradients
    ShardingType.ROW_WISE.value: 5,
    ShardingType.TABLE_ROW_WISE.value: 7,  # embeddings and gradients within hosts, then between them
}
_MILLISECONDS = {"cuda": 0.03, "cpu": 1.0}
"""Of a collective that carries next to nothing: a rule of thumb for NCCL's between hosts; for gloo's on one host, what
`make bench-distributed` measures, TorchRec's own work around it included."""
_GLOO_BYTES_PER_MS = 1.2e6
_LENGTH_BYTES = 4
_DIRECTIONS = 2
"""Embeddings on the way forward, their gradients on the way back."""


class StepTimeModel(NoopPerfModel):
    """TorchRec's estimate, and a fixed cost for each collective that a plan needs.

    Without it, a table of a few kB looks as cheap to split over all ranks as to replicate: neither sends many bytes.
    The tables of one sharding type share their collectives, so that the cost is a plan's and not a table's.
    """

    def __init__(self, topology: Topology) -> None:
        super().__init__(topology)
        self._latency = _MILLISECONDS.get(topology.compute_device, 0.0) if topology.world_size > 1 else 0.0

    def rate(self, plan: Sequence[ShardingOption]) -> float:
        """Milliseconds of a step on the slowest rank: lookup, update, communication."""
        kinds = {option.sharding_type for option in plan}
        milliseconds: float = super().rate(list(plan))
        return milliseconds + self._latency * sum(_COLLECTIVES[kind] for kind in kinds)


class GlooBandwidths(BasicCommsBandwidths):
    """What gloo carries between processes, in place of the NVLink and InfiniBand that TorchRec takes for granted."""

    def __init__(self) -> None:
        super().__init__(inter_host_bw=_GLOO_BYTES_PER_MS, intra_host_bw=_GLOO_BYTES_PER_MS)

    def get_bw(self, local_world_size: int, world_size: int, collective_type: CollectiveType) -> float:  # noqa: ARG002
        return _GLOO_BYTES_PER_MS


class MapStorageReservation(FixedPercentageStorageReservation):
    """Reserves host memory for the maps of a model, once a host: its ranks map the same files.

    Args:
        percentage: the share of device memory, 0 to 1, that is kept for everything but embedding tables.
    """

    def reserve(
        self,
        topology: Topology,
        batch_size: int,
        module: nn.Module,
        sharders: list[ModuleSharder[nn.Module]],
        constraints: dict[str, ParameterConstraints] | None = None,
    ) -> Topology:
        """`topology` with what is left for tables.

        Raises:
            PlannerError: the maps alone do not fit.
        """
        reserved = super().reserve(topology, batch_size, module, sharders, constraints)
        maps = map_bytes(module, local_world_size=topology.local_world_size)
        share = -(-sum(maps.values()) // topology.local_world_size)
        for device in reserved.devices:
            device.storage.ddr -= share
            if device.storage.ddr < 0:
                largest = max(maps, key=lambda name: maps[name])
                raise PlannerError(
                    f"the index-pointer maps need {decimal(sum(maps.values()))} of each host's memory, which has "
                    f"{decimal((device.storage.ddr + share) * topology.local_world_size)}; the largest map, of "
                    f"{largest!r}, needs {decimal(maps[largest])}",
                    PlannerErrorType.INSUFFICIENT_STORAGE,
                )
        self._last_reserved_topology = copy.deepcopy(reserved)
        return reserved


def map_bytes(module: nn.Module, *, local_world_size: int = 1) -> dict[str, int]:
    """Physical table, by path and name, → bytes of its map on a host: `n·c` pointers, also before the first clustering
    makes them, the vocabulary, who has a private row, and such rows where each rank has a replica in host memory.

    Args:
        local_world_size: ranks of a host.
    """
    sizes = {}
    for path, collection in module.named_modules():
        if not isinstance(collection, CCECollection):
            continue
        for table in collection.cce_configs():
            vocabulary = collection.pointer_map(table.name).vocabulary
            pointers = table.num_embeddings * table.pointer_format.num_bytes
            stock, _ = split_weight(collection.weight_name(table.name))
            size = pointers + (0 if vocabulary is None else vocabulary.nbytes)
            if table.residents is not None:
                replicas = 0 if table.has_stock_residents else local_world_size
                size += table.residency_bytes + replicas * table.resident_row_bytes
            sizes[joined(joined(path, stock), table.name)] = size
    return sizes


@dataclass(frozen=True, kw_only=True)
class TableSummary:
    """One table of a plan. Bytes and times are TorchRec's estimates for the planned batch size."""

    table: str
    """Path and name of the physical table."""
    sharding_type: str
    compute_kernel: str
    num_ranks: int
    """Ranks that hold a part, or a replica, of it."""
    device_bytes: int
    """On the rank that holds most: weights, optimizer state, and a batch of rows and of pooled embeddings."""
    host_bytes: int
    """On the host that holds most: the map, once, and what of the table itself is in host memory."""
    all_to_all_bytes: int
    """Sent by a rank in a step, on average, where tables are not replicated: rows, bag lengths, embeddings, gradients.
    Reduce-scatter and all-gather, by which tables that are split by rows do it, are counted here."""
    all_reduce_bytes: int
    """Sent by a rank in a step (ring) where tables are replicated: their gradients."""
    milliseconds: float
    """Lookup, update and communication of a step, on the slowest rank, but for the latency of collectives."""


@dataclass(frozen=True, kw_only=True)
class PlanSummary:
    """A plan. The fullest rank or host of all tables together need not be the fullest of any one, and the latency of
    collectives is shared by all tables.
    """

    tables: tuple[TableSummary, ...]
    device_bytes: int
    host_bytes: int
    all_to_all_bytes: int
    all_reduce_bytes: int
    milliseconds: float


def summarise(
    options: Sequence[ShardingOption],
    topology: Topology,
    *,
    maps: Mapping[str, int],
    poolings: Mapping[str, Sequence[float]],
) -> PlanSummary:
    """The figures of the `options` that a planner chose.

    Args:
        maps: table, by path and name → bytes of its map.
        poolings: name of a table → bags a row of a batch, for each of its column features.
    """
    world_size, local = topology.world_size, topology.local_world_size
    device_bytes: Counter[int] = Counter()
    host_bytes: Counter[int] = Counter({host: sum(maps.values()) for host in range(-(-world_size // local))})
    tables = []
    for option in options:
        on_device: Counter[int] = Counter()
        on_host: Counter[int] = Counter({0: 0})
        busy: defaultdict[int, float] = defaultdict(float)
        for shard in option.shards:
            on_device[shard.rank] += shard.storage.hbm
            on_host[shard.rank // local] += shard.storage.ddr
            busy[shard.rank] += shard.perf.total
        device_bytes.update(on_device)
        host_bytes.update(on_host)
        replicated = option.sharding_type == ShardingType.DATA_PARALLEL.value
        tables.append(
            TableSummary(
                table=option.fqn,
                sharding_type=option.sharding_type,
                compute_kernel=PACKED if _is_packed(option, topology) else option.compute_kernel,
                num_ranks=len(busy),
                device_bytes=max(on_device.values()),
                host_bytes=maps.get(option.fqn, 0) + max(on_host.values()),
                all_to_all_bytes=0 if replicated else _all_to_all_bytes(option, topology, poolings[option.name]),
                all_reduce_bytes=_all_reduce_bytes(option, world_size) if replicated else 0,
                milliseconds=max(busy.values()),
            )
        )
    return PlanSummary(
        tables=tuple(tables),
        device_bytes=max(device_bytes.values(), default=0),
        host_bytes=max(host_bytes.values()),
        all_to_all_bytes=sum(table.all_to_all_bytes for table in tables),
        all_reduce_bytes=sum(table.all_reduce_bytes for table in tables),
        milliseconds=StepTimeModel(topology).rate(options),
    )


def _is_packed(option: ShardingOption, topology: Topology) -> bool:
    """Whether `ShardedBags` looks it up from words; on a GPU by Triton, which PyTorch's builds for CUDA bring."""
    return (
        topology.compute_device in ("cpu", "cuda")
        and option.compute_kernel == EmbeddingComputeKernel.DENSE.value
        and isinstance(option.module[1], EmbeddingBagCollection)
    )


def _all_to_all_bytes(option: ShardingOption, topology: Topology, poolings: Sequence[float]) -> int:
    """Of the `W` ranks, `G` have the rows of one table: 1, those of a host, or all.

    A rank sends each row number to one of the `G`, and the bag lengths to all `G`. Of the embeddings of all `W` batches
    it has partial sums of `1/(W/G)` of the tables, of which all but its own share `1/G` go to the others of the `G`
    (reduce-scatter), and what is summed then goes home, unless the `G` are all ranks.
    """
    world_size = topology.world_size
    group: int = {
        ShardingType.TABLE_WISE.value: 1,
        ShardingType.TABLE_ROW_WISE.value: topology.intra_group_size,
        ShardingType.ROW_WISE.value: world_size,
    }[option.sharding_type]
    batch: int = option.batch_size
    bags = batch * sum(poolings)
    rows: float = batch * sum(length * pooling for length, pooling in zip(option.input_lengths, poolings, strict=True))
    bag_bytes: int = option.tensor.shape[1] * option.tensor.element_size()
    away = (world_size - 1) / world_size
    inputs: float = (rows * BIGINT_DTYPE + bags * _LENGTH_BYTES * group) * away
    groups = world_size / group
    outputs: float = bags * bag_bytes * (group - 1 + (groups - 1) / groups)
    return round(inputs + _DIRECTIONS * outputs)


def _all_reduce_bytes(option: ShardingOption, world_size: int) -> int:
    """A ring sends all gradients but its own share twice."""
    gradients: int = option.tensor.numel() * option.tensor.element_size()
    return round(2 * (world_size - 1) / world_size * gradients)
