"""A model on several ranks, and the one process that it is compared with."""

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torchrec import PoolingType
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import (
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingPlan
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from tests.support.distributed_cases import DIM, Case, global_batches, rank_batches
from tests.support.launch import Job, on_ranks
from torchrec_cce import CCEEmbeddingBagCollection
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.sharding.sharders import CCEEmbeddingBagCollectionSharder

Array = npt.NDArray[np.float32]

CUDA_TOLERANCE = 1e-5
"""Ten times that of the CPU: the kernels add in another order."""
COLLECTION = "model.sparse_arch.embedding_bag_collection"
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 5.0}),
    "rowwise_adagrad": (RowWiseAdagrad, {"lr": 0.1, "eps": 1e-8}),
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was measured of a model after its training; the same on every rank."""

    losses: list[float]
    """Mean over the global batch, step by step."""
    weights: dict[str, Array]
    """Every entry of the state dict, put together from its shards."""
    states: dict[str, Array] = field(default_factory=dict)
    """Table → the optimizer's accumulator of each row, where there is one."""
    placement: dict[str, str] = field(default_factory=dict)
    fused: frozenset[str] = frozenset()
    """Tables that are updated in the backward pass."""

    def deviation(self, other: "Outcome") -> dict[str, float]:
        """The largest difference from `other`: of losses and weights, and of states in parts of a table's largest."""
        assert self.weights.keys() == other.weights.keys()
        assert self.states.keys() == other.states.keys()
        states = [
            np.abs(value - other.states[table]).max() / other.states[table].max()
            for table, value in self.states.items()
        ]
        return {
            "losses": max(abs(a - b) for a, b in zip(self.losses, other.losses, strict=True)),
            "weights": max(float(np.abs(value - other.weights[name]).max()) for name, value in self.weights.items()),
            "states": float(max(states, default=0.0)),
        }


def compare(
    folder: Path, cases: Mapping[str, Case], *, world_size: int, local_size: int, device_type: str = "cpu"
) -> dict[str, tuple[Outcome, Outcome]]:
    """Case → the outcomes on one process and on `world_size` ranks; all cases run in the same processes."""
    alone = Job(folder / "alone", on_one_process, list(cases.values()))
    finished = on_ranks(folder, world_size, on_a_rank, list(cases.values()), device_type, local_size)
    reference = alone.wait()
    for process in (reference, *finished):
        assert process.code == 0, process.stderr
    return dict(zip(cases, zip(reference.value, finished[0].value, strict=True), strict=True))


def assert_equal(pair: tuple[Outcome, Outcome], case: Case, *, tolerance: float) -> None:
    """Assert that both outcomes are the same, and that the tables lay where they should."""
    alone, spread = pair
    assert spread.placement == case.placement
    assert spread.fused == {table for table, way in case.placement.items() if way != "data_parallel"}
    deviation = spread.deviation(alone)
    assert deviation["losses"] <= tolerance, deviation
    # With means of a table that is split by rows, TorchRec divides by a length + 1e-6, and all else by 1 + 1e-6.
    means = {table.name for table in case.tables() if table.pooling == PoolingType.MEAN}
    inexact = any(case.placement.get(table) in ("row_wise", "table_row_wise") for table in means)
    assert deviation["weights"] <= tolerance * (5 if inexact else 1), deviation
    assert deviation["states"] <= tolerance * (50 if inexact else 5), deviation


def build_model(case: Case, device: torch.device) -> DLRMTrain:
    """A model with the same weights and maps in every process, whose CCE tables were clustered once."""
    torch.manual_seed(0)
    collection = CCEEmbeddingBagCollection(tables=case.tables(), is_weighted=case.pooling == "weighted", device=device)
    clustered = _clustered(frozenset(case.placement), case.use_helper, case.with_computed)
    for table in collection.cce_tables():
        collection.attach_pointer_map(table, clustered.pointer_map(table))
    collection.load_state_dict(clustered.state_dict())
    dlrm = DLRM(
        collection,
        dense_in_features=3,
        dense_arch_layer_sizes=[8, DIM],
        over_arch_layer_sizes=[8, 1],
        dense_device=device,
    )
    return DLRMTrain(dlrm)


@functools.cache
def _clustered(tables: frozenset[str], use_helper: bool, with_computed: bool) -> CCEEmbeddingBagCollection:
    """Tables that were clustered once; placement and pooling of a case make no difference to that."""
    case = Case(placement=dict.fromkeys(tables, ""), use_helper=use_helper, with_computed=with_computed)
    torch.manual_seed(0)
    collection = CCEEmbeddingBagCollection(tables=case.tables())
    # One thread: several processes share the machine.
    collection.recluster(seed=0, settings=ReclusterConfig(num_threads=1))
    return collection


def on_one_process(cases: Sequence[Case]) -> list[Outcome]:
    """Train unsharded, with PyTorch's own embedding bags and optimizers, and a fixed batch size."""
    return [_on_one_process(case) for case in cases]


def _on_one_process(case: Case) -> Outcome:
    model = build_model(case, torch.device("cpu"))
    kind, arguments = OPTIMIZERS[case.optimizer]
    bags = model.get_submodule(f"{COLLECTION}.ebc.embedding_bags")
    tables = {f"{COLLECTION}.ebc.embedding_bags.{name}.weight": name for name in case.placement}
    optimizer = kind(bags.parameters(), **arguments)
    dense = torch.optim.SGD([p for name, p in model.named_parameters() if name not in tables], lr=0.1)
    losses = []
    for batch in global_batches(case):
        loss, _ = model(batch)
        optimizer.zero_grad()
        dense.zero_grad()
        loss.backward()
        optimizer.step()
        dense.step()
        losses.append(loss.item())
    states = {
        name: optimizer.state[bags.get_parameter(f"{name}.weight")]["sum"].numpy().reshape(-1)
        for name in (case.placement if case.optimizer == "rowwise_adagrad" else ())
    }
    return Outcome(
        losses=losses,
        weights={name: value.detach().numpy() for name, value in model.state_dict().items()},
        states=states,
    )


def on_a_rank(cases: Sequence[Case], device_type: str, local_size: int) -> list[Outcome]:
    """Train every case on the ranks that the environment describes, `local_size` of them on one host."""
    rank, device = int(os.environ["RANK"]), join(device_type, local_size)
    outcomes = []
    for case in cases:
        model, optimizer = shard(case, device, local_size)
        losses = []
        for batch in rank_batches(case):
            optimizer.zero_grad()
            loss, _ = model(batch.to(device))
            loss.backward()
            optimizer.step()
            losses.append(mean_over_ranks(loss))
        outcomes.append(outcome_of(case, model, optimizer, losses))
    dist.destroy_process_group()
    return outcomes if rank == 0 else []


def join(device_type: str, local_size: int) -> torch.device:
    """Enter the process group; the device of this rank."""
    os.environ["LOCAL_WORLD_SIZE"] = str(local_size)
    local_rank = int(os.environ["RANK"]) % local_size
    os.environ["LOCAL_RANK"] = str(local_rank)
    if device_type == "cpu":
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    return device


def shard(case: Case, device: torch.device, local_size: int) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """The model on the ranks as `case.placement` says; replicated tables have an optimizer of the same kind."""
    model = build_model(case, device)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    ebc = model.get_submodule(f"{COLLECTION}.ebc")
    kind, arguments = OPTIMIZERS[case.optimizer]
    fused = [table for table, sharding_type in case.placement.items() if sharding_type != "data_parallel"]
    if fused:
        parameters = [ebc.get_parameter(f"embedding_bags.{table}.weight") for table in fused]
        apply_optimizer_in_backward(kind, parameters, {**arguments})  # a copy: TorchRec adds to it
    world_size = dist.get_world_size()
    sharder = CCEEmbeddingBagCollectionSharder()
    placements = {
        "data_parallel": lambda _: data_parallel(),
        "table_wise": lambda i: table_wise(rank=i % world_size),
        "row_wise": lambda _: row_wise(),
        "table_row_wise": lambda i: table_row_wise(host_index=i % (world_size // local_size)),
    }
    plan = construct_module_sharding_plan(
        ebc,
        {table: placements[way](i) for i, (table, way) in enumerate(case.placement.items())},
        sharder=sharder,
        local_size=local_size,
        world_size=world_size,
        device_type=device.type,
    )
    sharded = DistributedModelParallel(
        model, device=device, plan=ShardingPlan(plan={f"{COLLECTION}.ebc": plan}), sharders=[sharder]
    )
    sharded.load_state_dict(weights)
    rest = dict(in_backward_optimizer_filter(sharded.named_parameters()))
    replicated = {name: value for name, value in rest.items() if ".ebc.embedding_bags." in name}
    dense = {name: value for name, value in rest.items() if name not in replicated}
    optimizers: list[Any] = [sharded.fused_optimizer]
    if replicated:
        optimizers.append(KeyedOptimizerWrapper(replicated, lambda values: kind(values, **arguments)))
    optimizers.append(KeyedOptimizerWrapper(dense, lambda values: torch.optim.SGD(values, lr=0.1)))
    return sharded, CombinedOptimizer(optimizers)


def mean_over_ranks(loss: torch.Tensor) -> float:
    total = loss.detach().cpu().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def outcome_of(
    case: Case, model: DistributedModelParallel, optimizer: CombinedOptimizer, losses: list[float]
) -> Outcome:
    """Called on every rank."""
    states = optimizer.state_dict()["state"]
    accumulators: dict[str, Array] = {}
    for table in case.placement if case.optimizer == "rowwise_adagrad" else ():
        mine = states.get(f"{COLLECTION}.ebc.embedding_bags.{table}.weight", {})
        # Fused kernels name it for the table, and a rank that holds no shard has none.
        value = mine.get("sum", mine.get(f"{table}.momentum1"))
        accumulators[table] = whole(value).reshape(-1)
    ebc = model.module.get_submodule(f"{COLLECTION}.ebc")
    fused = {str(name).split(".")[-2] for name in model.fused_optimizer.params}
    held: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(held, fused)
    return Outcome(
        losses=losses,
        weights={name: whole(value) for name, value in model.state_dict().items()},
        states=accumulators,
        placement={name: each.sharding_type for name, each in ebc.module_sharding_plan.items()},
        fused=frozenset().union(*held),
    )


def whole(value: Any) -> Array:
    """A tensor of the state dict from its row shards on all ranks."""
    if isinstance(value, torch.Tensor) and not hasattr(value, "local_shards"):
        parts = [(0, value.detach().cpu().numpy())]
    else:
        shards = [] if value is None else value.local_shards()
        parts = [(s.metadata.shard_offsets[0], s.tensor.detach().cpu().numpy()) for s in shards]
    everyones: list[list[tuple[int, Array]]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyones, parts)
    distinct = {start: part for parts in everyones for start, part in parts}
    return np.concatenate([distinct[start] for start in sorted(distinct)])
