"""A planner that places CCE tables as what they are, and whose errors reach every rank."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from rich.filesize import decimal
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed.comm import get_local_size
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.proposers import GreedyProposer, GridSearchProposer, UniformProposer
from torchrec.distributed.planner.types import (
    KernelConfig,
    PlannerError,
    ShardingOption,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ModuleSharder, ShardingPlan, ShardingPlanner
from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_cce.errors import ConfigError
from torchrec_cce.methods.computed import ComputedEmbeddingBagConfig
from torchrec_cce.modules.collection import CCECollection
from torchrec_cce.sharding.agreement import on_first_rank
from torchrec_cce.sharding.constraints import column_constraints, constraints_of_one_rank, small_collections
from torchrec_cce.sharding.estimates import (
    GlooBandwidths,
    MapStorageReservation,
    PlanSummary,
    StepTimeModel,
    map_bytes,
    summarise,
)
from torchrec_cce.sharding.sharders import get_cce_sharders

_GRID = 1000
"""Plans up to which all are tried. TorchRec would try 10,000, which takes half a minute for 4 tables on 64 ranks."""


class CCEShardingPlanner(ShardingPlanner):
    """TorchRec's `EmbeddingShardingPlanner` for models with CCE collections, pooled or not.

    It plans for the columns of each feature, reserves host memory for maps and counts what a collective takes however
    little it carries. A small CCE table is then replicated, which needs no all-to-all; a large one is placed or split
    like any other. What is placed are the inner collections, as `<path>.ebc`. A replicated table is trained by the
    optimizer of the dense parameters, as always in TorchRec.

    Args:
        topology: ranks, their memory and their speed; None is what the process group and this machine have. See
            `planning_topology`.
        batch_size: rows of one rank's batch.
        constraints: table → what is known and wanted of it, in TorchRec's terms, with values a feature and not a
            column; bags of more than one ID need their `pooling_factors`.
        reserved: the share of device memory, 0 to 1, that is kept for everything but embedding tables.
        replicate_on_one_rank: whether small tables may be replicated on one rank, too. It sends nothing, but a CPU
            looks replicas up without a sort. They have no fused optimizer: yours trains them, as on several ranks.

    Example:
        >>> from torchrec_cce import CCEEmbeddingBagConfig
        >>> topology = planning_topology("cuda", world_size=8, device_bytes=80 << 30, host_bytes=1 << 40)
        >>> planner = CCEShardingPlanner(topology=topology, batch_size=4096)
        >>> ebc = CCEEmbeddingBagCollection(device=torch.device("meta"), tables=[CCEEmbeddingBagConfig(
        ...     name="t_user", num_embeddings=10**8, embedding_dim=128, feature_names=["user"], num_rows=500)])
        >>> planner.plan(ebc, get_cce_sharders()).plan["ebc"]["t_user"].sharding_type
        'data_parallel'
    """

    def __init__(
        self,
        *,
        topology: Topology | None = None,
        batch_size: int,
        constraints: Mapping[str, ParameterConstraints] | None = None,
        reserved: float = 0.15,
        replicate_on_one_rank: bool = False,
    ) -> None:
        self._topology = topology or _topology_here()
        self._batch_size = batch_size
        self._constraints = dict(constraints or {})
        self._reserved = reserved
        self._replicate_on_one_rank = replicate_on_one_rank
        self._summary: PlanSummary | None = None

    @property
    def summary(self) -> PlanSummary:
        """The last plan in figures.

        Raises:
            ConfigError: nothing was planned yet.
        """
        if self._summary is None:
            raise ConfigError("there is no plan yet; call plan or collective_plan first")
        return self._summary

    def plan(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> ShardingPlan:
        """A plan, made in this process alone.

        Raises:
            ConfigError: the model does not fit, or its constraints leave no placement.
        """
        plan, self._summary = self._plan(module, sharders)
        return plan

    def collective_plan(
        self,
        module: nn.Module,
        sharders: list[ModuleSharder[nn.Module]] | None = None,
        pg: dist.ProcessGroup | None = None,
    ) -> ShardingPlan:
        """A plan, made on rank 0 and the same on all ranks of `pg`, which all call this.

        Args:
            sharders: those that the model will be sharded by; None is `get_cce_sharders()`.
            pg: None is the whole process group.

        Raises:
            ConfigError: as of `plan`, on every rank.
        """
        plan, self._summary = on_first_rank(partial(self._plan, module, sharders or get_cce_sharders()), pg)
        return plan

    def _plan(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> tuple[ShardingPlan, PlanSummary]:
        constraints = self._constraints_of(module)
        chosen: list[ShardingOption] = []

        def note(options: list[ShardingOption]) -> list[ShardingOption]:
            chosen.extend(options)
            return options

        enumerator = EmbeddingEnumerator(self._topology, self._batch_size, constraints=constraints)
        reservation = MapStorageReservation(self._reserved)
        planner = EmbeddingShardingPlanner(
            topology=self._topology,
            batch_size=self._batch_size,
            enumerator=enumerator,
            storage_reservation=reservation,
            proposer=[
                GridSearchProposer(max_proposals=_GRID),
                GreedyProposer(),
                GreedyProposer(use_depth=False),
                UniformProposer(),
            ],
            performance_model=StepTimeModel(self._topology),
            stats=[],
            constraints=constraints,
            debug=False,
            callbacks=[note],
        )
        try:
            with _without_warnings_of_replicas():
                plan = planner.plan(module, sharders)
        except PlannerError as error:
            options, left = enumerator.last_stored_search_space, reservation.last_reserved_topology
            raise ConfigError(f"no plan: {_why(options, left) if options and left else error}") from error
        poolings = {
            option.name: constraints[option.name].num_poolings or [1.0] * option.num_inputs for option in chosen
        }
        maps = map_bytes(module, local_world_size=self._topology.local_world_size)
        return plan, summarise(chosen, self._topology, maps=maps, poolings=poolings)

    def _constraints_of(self, module: nn.Module) -> dict[str, ParameterConstraints]:
        tables: dict[str, BaseEmbeddingConfig] = {}
        for table in _tables(module):
            if tables.setdefault(table.name, table) != table:
                raise ConfigError(
                    f"the model has two different tables of the name {table.name!r}; the planner takes constraints by "
                    "name, so give one another name"
                )
        constraints = column_constraints(list(tables.values()), self._constraints)
        if self._topology.world_size > 1:
            return constraints
        may_replicate = self._replicate_on_one_rank and self._topology.compute_device == "cpu"
        replicated = small_collections(module, constraints, self._batch_size) if may_replicate else frozenset()
        return constraints_of_one_rank(constraints, replicated)


def planning_topology(
    device: str, *, world_size: int, device_bytes: int, host_bytes: int, local_world_size: int | None = None
) -> Topology:
    """A TorchRec `Topology` of equal hosts.

    Args:
        device: `"cuda"` or `"cpu"`.
        device_bytes: memory of a GPU.
        host_bytes: memory of a host, shared by its ranks.
        local_world_size: ranks of a host; all of them if not given.

    Raises:
        ConfigError: the ranks do not fill whole hosts.
    """
    local = local_world_size or world_size
    if world_size < 1 or local < 1 or world_size % local:
        raise ConfigError(
            f"world_size={world_size} is not a multiple of local_world_size={local}, at least 1 each: the "
            "hosts must be equal"
        )
    return TopologyFactory.create_topology(
        TrainerConfig(
            world_size=world_size,
            local_world_size=local,
            hbm_cap_bytes=device_bytes,
            ddr_cap_bytes=host_bytes // local,
        ),
        kernel_config=KernelConfig(
            compute_device=device, generalized_comms_bandwidths=GlooBandwidths() if device == "cpu" else None
        ),
    )


def _topology_here() -> Topology:
    """That of the process group, with the memory of this machine."""
    if not dist.is_initialized():
        raise ConfigError(
            "there is no process group to plan for; initialise one, or pass topology=planning_topology(…)"
        )
    cuda, world_size = torch.cuda.is_available(), dist.get_world_size()
    return planning_topology(
        "cuda" if cuda else "cpu",
        world_size=world_size,
        local_world_size=get_local_size() if world_size > 1 else 1,  # else it warns that no launcher told it
        device_bytes=torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if cuda else 0,
        host_bytes=_host_bytes(),
    )


def _host_bytes() -> int:
    """This machine's memory, or what its container may use of it."""
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # no cgroup v2, or its limit is "max"
        return min(installed, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return installed


def _tables(module: nn.Module) -> Iterator[BaseEmbeddingConfig]:
    """Those of all collections in `module`, as their user described them."""
    inside: set[nn.Module] = set()
    for collection in module.modules():  # a parent comes before its children
        if isinstance(collection, CCECollection):
            inside.update(collection.modules())
            yield from (table for table in collection.configs() if not isinstance(table, ComputedEmbeddingBagConfig))
        elif collection in inside:
            continue
        elif isinstance(collection, EmbeddingBagCollection):
            yield from collection.embedding_bag_configs()
        elif isinstance(collection, EmbeddingCollection):
            yield from collection.embedding_configs()


@contextmanager
def _without_warnings_of_replicas() -> Iterator[None]:
    """TorchRec warns of each replicated table that no sharding was found for it."""

    def passes(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Sharding spec not found for ")

    root = logging.getLogger()
    root.addFilter(passes)
    try:
        yield
    finally:
        root.removeFilter(passes)


def _why(options: Sequence[ShardingOption], left: Topology) -> str:
    """What does not fit: all tables together, or one that no rank has room for."""
    in_all: dict[str, int] = {}
    on_a_rank: dict[str, int] = {}
    for option in options:
        sizes = [shard.storage.hbm + shard.storage.ddr for shard in option.shards]
        in_all[option.name] = min(sum(sizes), in_all.get(option.name, sum(sizes)))
        on_a_rank[option.name] = min(max(sizes), on_a_rank.get(option.name, max(sizes)))
    largest = max(on_a_rank, key=lambda name: on_a_rank[name])
    ways = sorted({option.sharding_type for option in options if option.name == largest})
    storage = left.devices[0].storage
    device = f"{decimal(storage.hbm)} of device memory and " if left.compute_device == "cuda" else ""
    return (
        f"the tables need at least {decimal(sum(in_all.values()))} in all, the largest, {largest!r}, at least "
        f"{decimal(on_a_rank[largest])} on a rank ({' or '.join(ways)}); each of {left.world_size} ranks has {device}"
        f"{decimal(storage.ddr)} of host memory for them"
    )
