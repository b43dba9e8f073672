"""The time of a step, as TorchRec models it from bytes and bandwidths, with what it leaves out."""

from collections.abc import Sequence

from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.perf_models import NoopPerfModel
from torchrec.distributed.planner.types import BasicCommsBandwidths, CollectiveType, ShardingOption
from torchrec.distributed.types import ShardingType

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
