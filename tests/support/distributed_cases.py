"""Small models with tables of every kind, the placement of their tables, and batches for them."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
from torchrec.datasets.utils import Batch

from torchrec_cce import (
    CCEEmbeddingBagConfig,
    CompositionalEmbeddingBagConfig,
    DeepHashEmbeddingBagConfig,
    LowRankEmbeddingBagConfig,
    QuotientRemainderEmbeddingBagConfig,
    QuotientRemainderProductEmbeddingBagConfig,
    RobeEmbeddingBagConfig,
    SketchEmbeddingBagConfig,
    TensorTrainEmbeddingBagConfig,
)
from torchrec_cce.maps.pointer_format import MinPointerBits
from torchrec_cce.methods.computed import ComputedEmbeddingBagConfig
from torchrec_cce.methods.residents import ResidentConfig

STEPS = 20
BATCH_SIZE = 16
"""Over all ranks; 2 and 4 divide it."""
DIM = 16

Optimizer = Literal["sgd", "rowwise_adagrad"]
Pooling = Literal["sum", "mean", "weighted", "sum and mean"]
Form = Literal["int64", "int32", "variable", "variable, even"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model on one plan."""

    placement: Mapping[str, str]
    """Table → sharding type; these are the tables of the model."""
    optimizer: Optimizer = "rowwise_adagrad"
    pooling: Pooling = "sum"
    form: Form = "int64"
    """Of the IDs. `variable` is a batch size of its own for each feature and rank; `even`, the same on all ranks."""
    use_helper: bool = True
    with_computed: bool = False
    """Whether the model also has a table of every kind that is computed, which are always replicated."""
    residents: ResidentConfig | None = None
    """Of the tables `user` and `item`, in place of the helper."""
    min_pointer_bits: MinPointerBits = 8
    in_sequences: bool = False
    """Whether every ID has an embedding, and is not pooled; for the tables `user`, `item` and `day`."""

    def tables(self) -> list[EmbeddingBagConfig]:
        shared: dict[str, Any] = {"embedding_dim": DIM}
        clustered = {"num_embeddings": 400, "use_helper": self.use_helper, **shared}
        clustered["min_pointer_bits"] = self.min_pointer_bits
        may_have = {"residents": self.residents, **clustered}
        every = [
            CCEEmbeddingBagConfig(name="user", feature_names=["user", "friend"], num_rows=13, **may_have),
            CCEEmbeddingBagConfig(name="item", feature_names=["item"], num_rows=10, num_columns=2, **may_have),
            CCEEmbeddingBagConfig(name="narrow", feature_names=["word"], num_rows=6, num_columns=DIM, **clustered),
            CompositionalEmbeddingBagConfig(
                name="tag", feature_names=["tag"], num_embeddings=90, num_rows=11, **shared
            ),
            EmbeddingBagConfig(name="day", feature_names=["day"], num_embeddings=7, **shared),
            CompositionalEmbeddingBagConfig(
                name="signed", feature_names=["s"], num_embeddings=90, num_rows=11, num_columns=4, signed=True, **shared
            ),
            QuotientRemainderEmbeddingBagConfig(
                name="qr_sum", feature_names=["q"], num_embeddings=90, num_rows=20, **shared
            ),
            QuotientRemainderEmbeddingBagConfig(
                name="qr_concat", feature_names=["r"], num_embeddings=90, num_rows=20, operation="concat", **shared
            ),
            *(_computed_tables() if self.with_computed else ()),
        ]
        means = {"mean": {table.name for table in every}, "sum and mean": {"user", "day", "dhe"}}.get(
            self.pooling, set()
        )
        for table in every:
            table.pooling = PoolingType.MEAN if table.name in means else PoolingType.SUM
        return [t for t in every if t.name in self.placement or isinstance(t, ComputedEmbeddingBagConfig)]


def _computed_tables() -> list[ComputedEmbeddingBagConfig]:
    shared: dict[str, Any] = {"num_embeddings": 90, "embedding_dim": DIM}
    return [
        DeepHashEmbeddingBagConfig(name="dhe", feature_names=["a", "b"], width=8, **shared),
        RobeEmbeddingBagConfig(name="robe", feature_names=["g"], num_weights=99, block_size=4, signed=True, **shared),
        TensorTrainEmbeddingBagConfig(name="tt", feature_names=["c"], rank=2, **shared),
        LowRankEmbeddingBagConfig(name="low_rank", feature_names=["d"], rank=2, **shared),
        SketchEmbeddingBagConfig(
            name="sketch",
            feature_names=["e"],
            num_rows=9,
            num_terms=2,
            num_stored_terms=1,
            num_weight_rows=30,
            **shared,
        ),
        QuotientRemainderProductEmbeddingBagConfig(name="qr_product", feature_names=["f"], num_rows=20, **shared),
    ]


TABLES = ("user", "item", "tag", "day")
MIXED = {
    "user": "row_wise",
    "item": "table_wise",
    "tag": "table_row_wise",
    "day": "data_parallel",
    "narrow": "data_parallel",  # columns of 1 float, for which FBGEMM has no fused kernel
}
_OPTIMIZERS: tuple[Optimizer, ...] = ("sgd", "rowwise_adagrad")
_POOLINGS: tuple[Pooling, ...] = ("sum", "mean", "weighted")  # TorchRec has no weighted mean


def _all_as(sharding_type: str) -> dict[str, str]:
    return dict.fromkeys(TABLES, sharding_type)


UNIFORM = {
    f"{kind}, {optimizer}, {pooling}": Case(placement=_all_as(kind), optimizer=optimizer, pooling=pooling)
    for kind, optimizer, pooling in product(
        ("data_parallel", "table_wise", "row_wise", "table_row_wise"), _OPTIMIZERS, _POOLINGS
    )
}
MIXTURES = {
    f"mixed, {optimizer}, {pooling}": Case(placement=MIXED, optimizer=optimizer, pooling=pooling)
    for optimizer, pooling in product(_OPTIMIZERS, (*_POOLINGS, "sum and mean"))
}
WITHOUT_HELPER = {
    f"mixed, without helper, {optimizer}, sum and mean": Case(
        placement=MIXED, optimizer=optimizer, pooling="sum and mean", use_helper=False
    )
    for optimizer in _OPTIMIZERS
}
FORMS = {
    "mixed, int32": Case(placement=MIXED, form="int32"),
    "table_wise, variable": Case(placement=_all_as("table_wise"), form="variable"),
    "row_wise, variable, even": Case(placement=_all_as("row_wise"), form="variable, even"),
    "row_wise, mean, variable, even": Case(placement=_all_as("row_wise"), form="variable, even", pooling="mean"),
    "table_row_wise, variable, even": Case(placement=_all_as("table_row_wise"), form="variable, even"),
}


OTHER_METHODS = {
    f"other methods{', signed' if is_signed else ''}, {way}, {optimizer}, {pooling}": Case(
        placement={"user": way, "qr_sum": way, "qr_concat": way} | ({"signed": way} if is_signed else {}),
        optimizer=optimizer,
        pooling=pooling,
        with_computed=True,
    )
    for way in ("data_parallel", "table_wise", "row_wise")
    for optimizer in _OPTIMIZERS
    for pooling, is_signed in (("sum", True), ("mean", True), ("mean", False), ("weighted", True))
    if is_signed or way == "row_wise"
}


def global_batches(case: Case, steps: int = STEPS) -> list[Batch]:
    """Batches of bags of 0 to 3 IDs. In the second half of batch 3 the last feature is empty; of batch 4, all are."""
    sizes = tuple((feature, table.num_embeddings) for table in case.tables() for feature in table.feature_names)
    return _global_batches(sizes, case.form == "int32", case.pooling == "weighted", steps)


@functools.cache
def _global_batches(sizes: tuple[tuple[str, int], ...], is_int32: bool, is_weighted: bool, steps: int) -> list[Batch]:
    """Drawn once for all cases that have them; nothing that trains on a batch changes it."""
    rng = np.random.default_rng(0)
    empty = {3: -1, 4: 0}
    return [_global_batch(dict(sizes), is_int32, is_weighted, rng, empty=empty.get(step)) for step in range(steps)]


def _global_batch(
    sizes: dict[str, int], is_int32: bool, is_weighted: bool, rng: np.random.Generator, *, empty: int | None
) -> Batch:
    lengths = rng.integers(0, 4, (len(sizes), BATCH_SIZE)).astype(np.int32)
    if empty is not None:
        lengths[empty:, BATCH_SIZE // 2 :] = 0
    # Few distinct bags, so that a variable batch size has something to leave out.
    seeds = rng.integers(0, 2**31, (len(sizes), 5))
    bags = []
    for (_, num_ids), row, pool in zip(sizes.items(), lengths, seeds, strict=True):
        for length, seed in zip(row, rng.choice(pool, BATCH_SIZE), strict=True):
            bags.append(np.random.default_rng(seed).integers(0, num_ids, length))
    values = torch.from_numpy(np.concatenate(bags)).to(torch.int32 if is_int32 else torch.int64)
    weights = torch.from_numpy(rng.random(len(values), dtype=np.float32)) if is_weighted else None
    features = KeyedJaggedTensor(
        keys=list(sizes), values=values, lengths=torch.from_numpy(lengths.reshape(-1)), weights=weights
    )
    labels = torch.from_numpy(rng.integers(0, 2, BATCH_SIZE).astype(np.float32))
    return Batch(torch.from_numpy(rng.random((BATCH_SIZE, 3), dtype=np.float32)), features, labels)


def part_of(batch: Batch, *, rank: int, world_size: int, num_rows: int = BATCH_SIZE) -> Batch:
    """Of the first `num_rows` rows of a global batch, those that a rank trains on."""
    rows = slice(rank * num_rows // world_size, (rank + 1) * num_rows // world_size)
    bags = [batch.sparse_features[key] for key in batch.sparse_features.keys()]  # noqa: SIM118  not a mapping
    spans = [slice(int(bag.offsets()[rows.start]), int(bag.offsets()[rows.stop])) for bag in bags]
    weights = None
    if batch.sparse_features.weights_or_none() is not None:
        weights = torch.cat([bag.weights()[span] for bag, span in zip(bags, spans, strict=True)])
    features = KeyedJaggedTensor(
        keys=batch.sparse_features.keys(),
        values=torch.cat([bag.values()[span] for bag, span in zip(bags, spans, strict=True)]),
        lengths=torch.cat([bag.lengths()[rows] for bag in bags]),
        weights=weights,
    )
    return Batch(batch.dense_features[rows], features, batch.labels[rows])


def with_variable_batch(features: KeyedJaggedTensor, *, even: bool) -> KeyedJaggedTensor:
    """The same features with each distinct bag once, and the indices that expand them again.

    Args:
        even: with empty bags, which no index names, up to the largest number of bags that a rank has of a feature.
    """
    values, lengths, strides, inverse = [], [], [], []
    for key in features.keys():  # noqa: SIM118  not a mapping
        bags = features[key].to_dense()
        distinct = {tuple(bag.tolist()): bag for bag in bags}
        position = {bag: i for i, bag in enumerate(distinct)}
        stride = torch.tensor(len(distinct))
        if even:
            dist.all_reduce(stride, dist.ReduceOp.MAX)
        values += list(distinct.values())
        lengths += [len(bag) for bag in distinct] + [0] * (int(stride) - len(distinct))
        strides.append([int(stride)])
        inverse.append([position[tuple(bag.tolist())] for bag in bags])
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=torch.cat(values),
        lengths=torch.tensor(lengths, dtype=torch.int32),
        stride_per_key_per_rank=strides,
        inverse_indices=(features.keys(), torch.tensor(inverse)),
    )


def rank_batches(case: Case, steps: int = STEPS, num_rows: int = BATCH_SIZE) -> list[Batch]:
    """This rank's parts of the first `num_rows` rows of the global batches."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    batches = global_batches(case, steps)
    parts = [part_of(batch, rank=rank, world_size=world_size, num_rows=num_rows) for batch in batches]
    if case.form.startswith("variable"):
        for part in parts:
            part.sparse_features = with_variable_batch(part.sparse_features, even=case.form.endswith("even"))
    return parts
