"""The ranks of a run: their process group, requests to stop that all of them hear, and a model sharded over them."""

import itertools
import os
import signal
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingCollection
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_cce.methods.computed import ComputedTable
from torchrec_cce.modules.state_names import bag_weight, embedding_weight, part_of
from torchrec_cce.sharding.sharders import get_cce_sharders
from torchrec_cce.training.adagrad import OnePassRowWiseAdagrad
from torchrec_cce.training.config import OptimizerConfig

_GROUPS = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes of a run."""

    rank: int
    world_size: int
    device: torch.device
    """Of this rank."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0


@contextmanager
def process_group() -> Iterator[Ranks]:
    """The group that `torchrun` describes in the environment, or a group of one."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "WORLD_SIZE" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://"))
        # Torchrun's store outlives a group, and ranks that are restarted. None may find an older one's addresses there.
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"torchrec_cce/{restarts}/{next(_GROUPS)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Ranks(rank=dist.get_rank(), world_size=dist.get_world_size(), device=device)
    finally:
        dist.destroy_process_group()


class StopRequest:
    """Ctrl-C and SIGTERM as a request to stop after the batch at hand; and a loss that is no number, as one to stop
    before its gradient reaches a weight.

    While entered, the first SIGINT or SIGTERM is remembered, and a second one acts as it always did.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._received = False
        self.has_diverged = False
        """Whether the loss of this rank's part of a batch is no number; after `on_any_rank`, whether any rank's is."""
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._handle) for number in self._SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self._received = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def on_any_rank(self) -> bool:
        """Whether any rank was asked to stop: the same answer on all ranks, which all call it once a batch."""
        if dist.get_world_size() == 1:
            return self._received
        votes = torch.tensor([self._received, self.has_diverged], dtype=torch.uint8)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        stops, self.has_diverged = (bool(vote) for vote in votes)
        return stops


def shard(
    model: nn.Module,
    plan: ShardingPlan,
    config: OptimizerConfig,
    ranks: Ranks,
    *,
    rates: Mapping[str, float] | None = None,
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """Place the tables of `model` as `plan` says, replicate the rest, and build the optimizers.

    The weights stay those that `model` came with, whatever the number of ranks.

    Args:
        rates: the learning rates of `RESIDENTS` and `CODEWORDS`, if they are not that of the tables.
    """
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = table_optimizer(config)
    replicated: defaultdict[float, set[str]] = defaultdict(set)  # by their learning rate
    for path, tables in plan.plan.items():
        rate = (rates or {}).get(part_of(path), config.embedding_learning_rate)
        name_of = embedding_weight if isinstance(model.get_submodule(path), EmbeddingCollection) else bag_weight
        for name, placement in tables.items():
            weight = name_of(path, name)
            if placement.compute_kernel == EmbeddingComputeKernel.DENSE.value:
                replicated[rate].add(weight)
            else:  # in a new dict, for it adds to what it is given
                arguments = optimizer.arguments | {"lr": rate}
                apply_optimizer_in_backward(optimizer.kind, [model.get_parameter(weight)], arguments)
    sharded = DistributedModelParallel(model, device=ranks.device, plan=plan, sharders=get_cce_sharders())
    sharded.load_state_dict(weights)

    computed, with_rows = (
        {
            f"{path}.{name}"
            for path, module in model.named_modules()
            if isinstance(module, ComputedTable) and module.has_rows == has_rows
            for name, _ in module.named_parameters()
        }
        for has_rows in (False, True)
    )
    rest = dict(in_backward_optimizer_filter(sharded.named_parameters()))
    of_tables = computed.union(with_rows, *replicated.values())
    kinds = [
        *(
            (optimizer.replicated_kind, optimizer.arguments | {"lr": rate}, names)
            for rate, names in sorted(replicated.items())
        ),
        (optimizer.computed_kind, optimizer.arguments, computed),
        (optimizer.kind, optimizer.arguments, with_rows),
        (OPTIMIZERS[config.dense], {"lr": config.dense_learning_rate}, rest.keys() - of_tables),
    ]
    groups = [(kind, arguments, {n: p for n, p in rest.items() if n in names}) for kind, arguments, names in kinds]
    optimizers = [KeyedOptimizerWrapper(held, partial(kind, **arguments)) for kind, arguments, held in groups if held]
    return sharded, CombinedOptimizer([sharded.fused_optimizer, *optimizers])


OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
_FUSED = ("sgd", "rowwise_adagrad", "adagrad")
"""The optimizers that FBGEMM fuses on the CPU and on CUDA alike."""
_ADAGRADS = ("rowwise_adagrad", "adagrad")
_EPSILON = 1e-8
"""FBGEMM's, where PyTorch's and TorchRec's Adagrads have 1e-10."""


@dataclass(frozen=True, kw_only=True)
class TableOptimizer:
    """The optimizer of the tables, wherever they are placed: fused, or as `kind(parameters, **arguments)`."""

    kind: type[torch.optim.Optimizer]
    computed_kind: type[torch.optim.Optimizer]
    """That of computed tables whose parameters' rows are no embeddings: Adagrad takes the place of rowwise Adagrad."""
    arguments: dict[str, Any]
    replicated_kind: type[torch.optim.Optimizer]
    """The same as `kind`, for replicas."""
    can_be_fused: bool
    """Whether FBGEMM can do the same in the backward pass. If it cannot, all tables are replicated."""


def table_optimizer(config: OptimizerConfig) -> TableOptimizer:
    kind = OPTIMIZERS[config.embedding]
    arguments: dict[str, Any] = {"lr": config.embedding_learning_rate}
    if config.embedding in _ADAGRADS:
        arguments["eps"] = _EPSILON
    if config.embedding_weight_decay is not None:
        arguments["weight_decay"] = config.embedding_weight_decay
    return TableOptimizer(
        kind=kind,
        computed_kind=OPTIMIZERS["adagrad" if config.embedding == "rowwise_adagrad" else config.embedding],
        arguments=arguments,
        replicated_kind=OnePassRowWiseAdagrad if kind is RowWiseAdagrad else kind,
        # FBGEMM takes a weight decay without a word and decays nothing.
        can_be_fused=config.embedding in _FUSED and not config.embedding_weight_decay,
    )
