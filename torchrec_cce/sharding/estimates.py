"""The time of a step, as TorchRec models it from bytes and bandwidths, with what it leaves out."""

import copy
from collections.abc import Sequence

from rich.filesize import decimal
from torch import nn
from torchrec.distributed.planner import ParameterConstraints, Topology
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

from torchrec_cce.maps.residency import residency_bytes
from torchrec_cce.modules.collection import CCECollection
from torchrec_cce.modules.state_names import joined, split_weight

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
        maps = map_bytes(module)
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


def map_bytes(module: nn.Module) -> dict[str, int]:
    """Physical table, by path and name, → bytes of its map: `n·c` pointers, also before the first clustering makes
    them, the vocabulary, and who has a private row.
    """
    sizes = {}
    for path, collection in module.named_modules():
        if not isinstance(collection, CCECollection):
            continue
        for table in collection.cce_configs():
            vocabulary = collection.pointer_map(table.name).vocabulary
            pointers = table.num_embeddings * table.num_columns * table.pointer_dtype.itemsize
            stock, _ = split_weight(collection.weight_name(table.name))
            size = pointers + (0 if vocabulary is None else vocabulary.nbytes)
            if table.residents is not None:
                size += residency_bytes(table.num_embeddings)
            sizes[joined(joined(path, stock), table.name)] = size
    return sizes
