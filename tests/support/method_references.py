"""Every method from its definition, one raw ID at a time: what a table must return for it."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig, PoolingType

from tests.support import plain_embedding as plain
from torchrec_cce import CCEEmbeddingBagCollection
from torchrec_cce.hashing import UniversalHash, derive_seed, term_hash
from torchrec_cce.methods.compositional import CompositionalEmbeddingBagConfig
from torchrec_cce.methods.computed import ComputedEmbeddingBagConfig
from torchrec_cce.methods.deep_hash import DeepHashEmbeddingBagConfig
from torchrec_cce.methods.low_rank import LowRankEmbeddingBagConfig
from torchrec_cce.methods.quotient_remainder import (
    QuotientRemainderEmbeddingBagConfig,
    QuotientRemainderProductEmbeddingBagConfig,
)
from torchrec_cce.methods.robe import RobeEmbeddingBagConfig
from torchrec_cce.methods.sketch import SketchEmbeddingBagConfig
from torchrec_cce.methods.tensor_train import TensorTrainEmbeddingBagConfig

Parameters = Mapping[str, torch.Tensor]


def parameters_of(collection: CCEEmbeddingBagCollection, table: BaseEmbeddingConfig) -> dict[str, torch.nn.Parameter]:
    """The trained parameters of one table, by their names inside it."""
    if isinstance(table, ComputedEmbeddingBagConfig):
        return dict(collection.computed.tables[table.name].named_parameters())
    return {"weight": collection.get_parameter(collection.weight_name(table.name))}


def embedding(
    collection: CCEEmbeddingBagCollection, table: BaseEmbeddingConfig, parameters: Parameters, raw_id: int
) -> torch.Tensor:
    """[d]."""
    if isinstance(table, QuotientRemainderEmbeddingBagConfig):
        return _quotient_remainder(table, parameters["weight"], raw_id)
    if isinstance(table, CompositionalEmbeddingBagConfig) and table.signed:
        return _count_sketch(table, parameters["weight"], raw_id)
    if type(table) in _COMPUTED:
        pointers = getattr(collection.computed.tables[table.name], "pointers", None)
        return _COMPUTED[type(table)](table, parameters, raw_id, pointers)
    return plain.embedding(collection, table, parameters["weight"], raw_id)


def pooled(
    collection: CCEEmbeddingBagCollection,
    table: EmbeddingBagConfig,
    parameters: Parameters,
    bags: list[list[int]],
    weights: list[torch.Tensor] | None,
) -> torch.Tensor:
    """[B, d]."""
    rows = []
    for b, bag in enumerate(bags):
        total = torch.zeros(table.embedding_dim)
        for i, raw_id in enumerate(bag):
            word = embedding(collection, table, parameters, raw_id)
            total = total + (word if weights is None else word * weights[b][i])
        rows.append(total / len(bag) if bag and table.pooling == PoolingType.MEAN else total)
    return torch.stack(rows)


def _seed(table: BaseEmbeddingConfig) -> int:
    return derive_seed(table.seed, table.name)


def _hash(table: BaseEmbeddingConfig, purpose: str, function: int, num_rows: int, raw_id: int) -> int:
    functions = UniversalHash.from_seed(derive_seed(_seed(table), purpose), num_columns=function + 1, num_rows=num_rows)
    return int(functions.numpy(np.array([raw_id]))[0, function])


def _quotient_remainder(table: QuotientRemainderEmbeddingBagConfig, weight: torch.Tensor, raw_id: int) -> torch.Tensor:
    remainder, quotient = weight[raw_id % table.num_rows], weight[table.num_rows + raw_id // table.num_rows]
    return torch.cat([remainder, quotient]) if table.operation == "concat" else remainder + quotient


def _count_sketch(table: CompositionalEmbeddingBagConfig, weight: torch.Tensor, raw_id: int) -> torch.Tensor:
    c, t, k = table.num_columns, table.num_terms, table.num_rows
    columns = []
    for j in range(c):
        column = torch.zeros(table.embedding_dim // c)
        for p in range(t):
            code = term_hash(_seed(table), p, num_columns=c, num_rows=k).numpy(np.array([raw_id]))[0, j]
            sign = 2 * _hash(table, "signs", j * t + p, 2, raw_id) - 1
            column = column + sign * weight[(t * j + p) * k + int(code)]
        columns.append(column)
    return torch.cat(columns)


def _product(
    table: QuotientRemainderProductEmbeddingBagConfig, parameters: Parameters, raw_id: int, _: object
) -> torch.Tensor:
    return parameters["remainders"][raw_id % table.num_rows] * parameters["quotients"][raw_id // table.num_rows]


def _sketch(
    table: SketchEmbeddingBagConfig, parameters: Parameters, raw_id: int, pointers: torch.Tensor
) -> torch.Tensor:
    c, t, k, rows = table.num_columns, table.num_terms, table.num_rows, table.num_weight_rows
    columns = []
    for j in range(c):
        column = torch.zeros(table.embedding_dim // c)
        for p in range(t):
            code = int(term_hash(_seed(table), p, num_columns=c, num_rows=k).numpy(np.array([raw_id]))[0, j])
            if p < table.num_stored_terms:
                code = int(pointers[raw_id, j, p])
            first = j * k if table.shares_words else (j * t + p) * k
            word = parameters["words"][first + code]
            if rows and table.shares_weights:
                word = word * parameters["weights"][_hash(table, "weights", p, rows, raw_id), 0]
            elif rows:
                row = raw_id if rows >= table.num_embeddings else _hash(table, "weights", 0, rows, raw_id)
                word = word * parameters["weights"][row, p]
            column = column + word
        columns.append(column)
    return torch.cat(columns)


def _deep_hash(table: DeepHashEmbeddingBagConfig, parameters: Parameters, raw_id: int, _: object) -> torch.Tensor:
    hashes = [_hash(table, "values", f, 10**6, raw_id) for f in range(table.width)]
    units = torch.tensor([2 * value / 10**6 - 1 for value in hashes])
    for layer in range(3):
        units = parameters[f"layers.{layer}"].T @ units
        units = units * torch.tanh(torch.log1p(torch.exp(units)))
    return parameters["layers.3"].T @ units


def _robe(table: RobeEmbeddingBagConfig, parameters: Parameters, raw_id: int, _: object) -> torch.Tensor:
    values = []
    for element in range(table.embedding_dim):
        block, inside = divmod(element, table.block_size)
        offset = _hash(table, "offsets", block, table.num_weights, raw_id)
        value = parameters["weights"][(offset + inside) % table.num_weights]
        sign = 2 * _hash(table, "signs", block, 2, raw_id) - 1 if table.signed else 1
        values.append(sign * value)
    return torch.stack(values)


def _tensor_train(table: TensorTrainEmbeddingBagConfig, parameters: Parameters, raw_id: int, _: object) -> torch.Tensor:
    (_, n1, n2), (d0, d1, d2), r = table.row_factors, table.column_factors, table.rank
    i0, rest = divmod(raw_id, n1 * n2)
    i1, i2 = divmod(rest, n2)
    first = parameters["cores.0"][i0].view(d0, r)
    second = parameters["cores.1"][i1].view(r, d1, r)
    third = parameters["cores.2"][i2].view(r, d2)
    return torch.einsum("ar,rbs,sc->abc", first, second, third).flatten()


def _low_rank(table: LowRankEmbeddingBagConfig, parameters: Parameters, raw_id: int, _: object) -> torch.Tensor:
    return sum(parameters["rows"][raw_id, r] * parameters["projection"][r] for r in range(table.rank))


_COMPUTED: dict[type, Callable[..., torch.Tensor]] = {
    QuotientRemainderProductEmbeddingBagConfig: _product,
    SketchEmbeddingBagConfig: _sketch,
    DeepHashEmbeddingBagConfig: _deep_hash,
    RobeEmbeddingBagConfig: _robe,
    TensorTrainEmbeddingBagConfig: _tensor_train,
    LowRankEmbeddingBagConfig: _low_rank,
}
