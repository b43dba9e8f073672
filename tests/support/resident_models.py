"""Tables with residents, trained on one process and on ranks, and what is compared of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, JaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, data_parallel, row_wise, table_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.keyed import CombinedOptimizer

from tests.support.distributed_cases import Case
from tests.support.parity import mean_over_ranks, whole
from torchrec_cce import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig, CCEEmbeddingCollection, CCEEmbeddingConfig
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.residency import Residency
from torchrec_cce.methods.cce import CCEConfig
from torchrec_cce.modules.collection import CCECollection
from torchrec_cce.modules.quantized_rows import QuantizedTable
from torchrec_cce.modules.state_names import RESIDENTS, joined, quantized_rows
from torchrec_cce.sharding.admit import admit_sharded, top_up_sharded
from torchrec_cce.sharding.recluster import recluster_sharded
from torchrec_cce.sharding.sharders import CCEEmbeddingBagCollectionSharder, CCEEmbeddingCollectionSharder
from torchrec_cce.training.config import OptimizerConfig
from torchrec_cce.training.parallel import Ranks, shard, table_optimizer

Array = npt.NDArray[Any]

NUM_ROWS = 12
"""Of a global batch: 2 and 3 ranks divide it."""
STEPS = 5
"""Batches of each of the three stretches: two phases, and one without residents."""
STRETCHES = 3
RATE, RATE_OF_ROWS = 0.1, 0.3
FREQUENCIES = {"user": np.arange(400) % 7}
SETTINGS = ReclusterConfig(num_iterations=10)
TABLES = ("user", "item")


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """A table with residents, as a rank sees it, put together from the shards of all."""

    pointer_map: PointerMap
    residency: Residency
    codewords: Array
    rows: Array
    """Of the residents: as float32, also where they are float16 or int8 numbers."""
    states: Mapping[str, Array]
    """Of the codewords: of those that have one value a row."""
    states_of_rows: Mapping[str, Array]


Tables = dict[str, Table]


@dataclass(frozen=True, kw_only=True)
class Change:
    """The tables around an admission or a fold."""

    is_fold: bool
    before: Tables
    after: Tables


@dataclass(frozen=True, kw_only=True)
class Outcome:
    losses: list[float]
    changes: list[Change]
    last: Tables


class Model(nn.Module):
    """Three predictions from all embeddings of a row, to be those of its dense features."""

    def __init__(self, case: Case, *, world_size: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.collection: CCECollection
        if case.in_sequences:
            self.collection = CCEEmbeddingCollection(tables=[unpooled(table) for table in case.tables()])
        else:
            self.collection = CCEEmbeddingBagCollection(tables=case.tables(), is_weighted=case.pooling == "weighted")
        self.sums = Sums()
        self.top = nn.Linear(sum(t.embedding_dim * len(t.feature_names) for t in case.tables()), 3)
        # Sums grow with the length of a bag: smaller steps, for losses that fall, and differences that do not grow.
        self.scale = world_size / NUM_ROWS / (10 if case.in_sequences else 1)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's part of the loss, of which the mean over ranks is that of the global batch, and that again."""
        embeddings = self.collection(batch.sparse_features)
        if isinstance(self.collection, CCEEmbeddingCollection):
            embeddings = self.sums(embeddings, batch.labels)
        else:
            embeddings = embeddings.values()
        predicted = self.top(embeddings)
        loss = (predicted - 3 * batch.dense_features).square().sum() * self.scale
        return loss, loss.detach()


def unpooled(table: EmbeddingBagConfig) -> EmbeddingConfig:
    """The same table, for sequences."""
    shared: dict[str, Any] = {
        "name": table.name,
        "num_embeddings": table.num_embeddings,
        "embedding_dim": table.embedding_dim,
        "feature_names": table.feature_names,
    }
    if not isinstance(table, CCEEmbeddingBagConfig):
        return EmbeddingConfig(**shared)
    return CCEEmbeddingConfig(
        num_rows=table.num_rows, num_columns=table.num_columns, residents=table.residents, **shared
    )


class Sums(nn.Module):
    """Of sequences what no sum of embeddings has: of each its own function, and more for later ones of a bag."""

    def forward(self, sequences: Mapping[str, JaggedTensor], labels: torch.Tensor) -> torch.Tensor:
        """[B, Σ d]."""
        sums = []
        for each in sequences.values():
            lengths = each.lengths()
            places = torch.arange(len(each.values())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
            values = torch.tanh(each.values()) * (1 + places[:, None])
            bags = torch.arange(len(labels)).repeat_interleave(lengths)
            sums.append(torch.zeros(len(labels), values.shape[1]).index_add(0, bags, values))
        return torch.cat(sums, dim=1)


class Alone:
    """One process with PyTorch's own embedding bags and optimizers."""

    def __init__(self, case: Case) -> None:
        self.model = Model(case)
        self.collection = self.model.collection
        self.frequencies = frequencies_of(case)
        kind = table_optimizer(optimizer_config(case))
        rows = [] if self.collection.residents is None else list(self.collection.residents.parameters())
        rest = [p for p in self.collection.parameters() if not any(p is row for row in rows)]
        groups = [{"params": rest}, {"params": rows, "lr": RATE_OF_ROWS}]
        self.optimizer = kind.kind([group for group in groups if group["params"]], **kind.arguments)
        self.dense = torch.optim.SGD(self.model.top.parameters(), lr=RATE)

    def train(self, batches: Sequence[Batch]) -> list[float]:
        losses = []
        for batch in batches:
            self.optimizer.zero_grad()
            self.dense.zero_grad()
            loss, _ = self.model(batch)
            loss.backward()
            self.optimizer.step()
            self.dense.step()
            losses.append(loss.item())
        return losses

    def admit(self) -> None:
        self.collection.admit(seed=3, optimizer=self.optimizer, frequencies=self.frequencies)

    def top_up(self, frequencies: Mapping[str, Array]) -> None:
        self.collection.top_up(seed=3, frequencies=frequencies)

    def fold(self) -> None:
        self.collection.recluster(seed=3, optimizer=self.optimizer, settings=SETTINGS)

    def parameters_of(self, table: str) -> tuple[nn.Parameter, nn.Parameter | QuantizedTable]:
        config = self.collection.remap.config(table)
        assert isinstance(config, CCEConfig)
        codewords = self.collection.get_parameter(self.collection.weight_name(table))
        if config.has_stock_residents:
            return codewords, self.collection.get_parameter(self.collection.residents_name(config))
        rows = self.collection.get_submodule(quantized_rows(config.resident_table))
        assert isinstance(rows, QuantizedTable)
        return codewords, rows

    def tables(self) -> Tables:
        tables = {}
        for name in TABLES:
            codewords, rows = self.parameters_of(name)
            tables[name] = Table(
                pointer_map=self.collection.pointer_map(name),
                residency=self.collection.remap.residency(name),
                codewords=codewords.detach().numpy().copy(),
                rows=rows.detach().numpy().copy() if isinstance(rows, nn.Parameter) else floats_of(rows),
                states=self.states_of(codewords),
                states_of_rows=self.states_of(rows) if isinstance(rows, nn.Parameter) else quantized_states(rows),
            )
        return tables

    def states_of(self, parameter: nn.Parameter) -> dict[str, Array]:
        return {
            name: value.numpy().copy()
            for name, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, torch.Tensor) and value.dim() > 0
        }

    def take_over(self, tables: Tables) -> None:
        """Go on from the tables of a rank."""
        for name, table in tables.items():
            codewords, rows = self.parameters_of(name)
            self.collection.attach_pointer_map(name, table.pointer_map)
            self.collection.remap.attach_residency(name, table.residency)
            codewords.data.copy_(torch.from_numpy(table.codewords))
            self.optimizer.state[codewords] = {n: torch.from_numpy(each.copy()) for n, each in table.states.items()}
            states = {n: torch.from_numpy(each.copy()) for n, each in table.states_of_rows.items()}
            if isinstance(rows, nn.Parameter):
                rows.data.copy_(torch.from_numpy(table.rows))
                self.optimizer.state[rows] = states
            else:
                rows.load_state_dict(states)


class Sharded:
    """One rank of several."""

    def __init__(self, case: Case, ranks: Ranks) -> None:
        model = Model(case, world_size=ranks.world_size)
        config = optimizer_config(case)
        self.frequencies = frequencies_of(case)
        self.model: DistributedModelParallel
        self.optimizer: CombinedOptimizer
        self.model, self.optimizer = shard(
            model, plan_of(model.collection, case, ranks.world_size), config, ranks, rates={RESIDENTS: RATE_OF_ROWS}
        )

    @property
    def collection(self) -> CCECollection:
        found = self.model.module.get_submodule("collection")
        assert isinstance(found, CCECollection)
        return found

    def train(self, batches: Sequence[Batch]) -> list[float]:
        losses = []
        for batch in batches:
            self.optimizer.zero_grad()
            loss, _ = self.model(batch)
            loss.backward()
            self.optimizer.step()
            losses.append(mean_over_ranks(loss))
        return losses

    def admit(self) -> None:
        admit_sharded(self.model, self.optimizer, seed=3, frequencies=self.frequencies)

    def top_up(self, frequencies: Mapping[str, Array]) -> None:
        top_up_sharded(self.model, seed=3, frequencies=frequencies)

    def fold(self) -> None:
        recluster_sharded(self.model, self.optimizer, seed=3, settings=SETTINGS)

    def tables(self) -> Tables:
        weights, states = self.model.state_dict(), self.optimizer.state_dict()["state"]
        tables = {}
        for name in TABLES:
            config = self.collection.remap.config(name)
            assert isinstance(config, CCEConfig)
            key = joined("collection", self.collection.weight_name(name))
            row_key = joined("collection", self.collection.residents_name(config))
            if row_key in weights:
                rows, states_of_rows = whole(weights[row_key]), states_of(states.get(row_key, {}))
            else:
                table = self.collection.get_submodule(quantized_rows(config.resident_table))
                assert isinstance(table, QuantizedTable)
                rows, states_of_rows = floats_of(table), quantized_states(table)
            residency = self.collection.remap.residency(name)
            tables[name] = Table(
                pointer_map=self.collection.pointer_map(name),
                residency=replace(
                    residency,
                    ages=np.array(residency.ages),
                    order=None if residency.order is None else np.array(residency.order),
                ),
                codewords=whole(weights[key]).copy(),
                rows=rows.copy(),
                states=states_of(states.get(key, {})),
                states_of_rows=states_of_rows,
            )
        return tables


def frequencies_of(case: Case) -> Mapping[str, Array]:
    """That are known when a phase begins."""
    return {} if case.residents is not None and case.residents.first_come else FREQUENCIES


def optimizer_config(case: Case) -> OptimizerConfig:
    return OptimizerConfig(
        embedding=case.optimizer, embedding_learning_rate=RATE, dense="sgd", dense_learning_rate=RATE
    )


def plan_of(collection: CCECollection, case: Case, world_size: int) -> ShardingPlan:
    ways = {
        "data_parallel": lambda _: data_parallel(),
        "table_wise": lambda i: table_wise(rank=i % world_size, compute_kernel="fused"),
        "row_wise": lambda _: row_wise(compute_kernel="fused"),
    }
    sharder: Any = CCEEmbeddingCollectionSharder() if case.in_sequences else CCEEmbeddingBagCollectionSharder()
    return ShardingPlan(
        plan={
            f"collection.{path}": construct_module_sharding_plan(
                stock,
                {
                    table.name: ways[case.placement[table.name.removesuffix("_residents")]](i)
                    for i, table in enumerate(
                        stock.embedding_configs() if case.in_sequences else stock.embedding_bag_configs()
                    )
                },
                sharder=sharder,
                local_size=world_size,
                world_size=world_size,
                device_type="cpu",
            )
            for path, stock in collection.named_modules()
            if isinstance(stock, EmbeddingCollection | EmbeddingBagCollection)
        }
    )


def floats_of(table: QuantizedTable) -> Array:
    return table.rows.numpy() * np.float32(table.step.item())


def quantized_states(table: QuantizedTable) -> dict[str, Array]:
    """All that goes into its next update."""
    return {name: value.numpy().copy() for name, value in table.state_dict().items()}


def states_of(states: dict[str, Any]) -> dict[str, Array]:
    """Name → the value of each row, of an optimizer that may be fused, from all ranks."""
    mine = {name.rpartition(".")[2]: value for name, value in states.items() if hasattr(value, "size")}
    names: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(names, set(mine))
    merged = {name: whole(mine.get(name)) for name in sorted(set().union(*names)) if name != "step"}
    return {"sum" if name == "momentum1" else name: state.copy() for name, state in merged.items()}


def train(trained: Alone | Sharded, batches: Sequence[Batch]) -> Outcome:
    """Two phases, and a stretch without residents."""
    losses, changes = [], []

    def change(*, is_fold: bool) -> None:
        before = trained.tables()
        (trained.fold if is_fold else trained.admit)()
        changes.append(Change(is_fold=is_fold, before=before, after=trained.tables()))

    for start in range(0, STRETCHES * STEPS, STEPS):
        if start < (STRETCHES - 1) * STEPS:
            change(is_fold=False)
        losses += trained.train(batches[start : start + STEPS])
        if start < (STRETCHES - 1) * STEPS:
            change(is_fold=True)
    return Outcome(losses=losses, changes=changes, last=trained.tables())


def train_with_arrivals(trained: Alone | Sharded, batches: Sequence[Batch]) -> tuple[list[float], list[Tables]]:
    """One phase, to which IDs come before each stretch, and a fold. Returns the losses, and the tables after each."""
    losses, tables = [], []
    trained.admit()
    for stretch in range(STRETCHES):
        counts = np.where(np.arange(400) % 6 <= stretch, np.arange(400) % 7, 0)
        trained.top_up({"user": counts, "item": counts[::-1]})
        losses += trained.train(batches[stretch * STEPS : (stretch + 1) * STEPS])
        tables.append(trained.tables())
    trained.fold()
    return losses, [*tables, trained.tables()]
