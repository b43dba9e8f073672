"""Plain PyTorch references of all methods and modules, from the definitions: one raw ID and one codeword at a time."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_cce import CCEEmbeddingBagCollection, CCEEmbeddingCollection
from torchrec_cce.hashing import UniversalHash, derive_seed, term_hash
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.methods.cafe import CafeEmbeddingBagConfig
from torchrec_cce.methods.cce import CCEConfig
from torchrec_cce.methods.compositional import CompositionalConfig, CompositionalEmbeddingBagConfig
from torchrec_cce.methods.computed import ComputedEmbeddingBagConfig
from torchrec_cce.methods.factored import LowRankEmbeddingBagConfig, TensorTrainEmbeddingBagConfig
from torchrec_cce.methods.quotient_remainder import (
    QuotientRemainderEmbeddingBagConfig,
    QuotientRemainderProductEmbeddingBagConfig,
)
from torchrec_cce.methods.rowless import DeepHashEmbeddingBagConfig, RobeEmbeddingBagConfig
from torchrec_cce.methods.sketch import SketchEmbeddingBagConfig
from torchrec_cce.modules.collection import CCECollection

Parameters = Mapping[str, torch.Tensor]


def parameters_of(collection: CCEEmbeddingBagCollection, table: BaseEmbeddingConfig) -> dict[str, torch.nn.Parameter]:
    """The trained parameters of one table, by their names inside it."""
    if isinstance(table, ComputedEmbeddingBagConfig):
        return dict(collection.computed.tables[table.name].named_parameters())
    return {"weight": collection.get_parameter(collection.weight_name(table.name))}


def embedding(
    collection: CCECollection, table: BaseEmbeddingConfig, parameters: Parameters, raw_id: int
) -> torch.Tensor:
    """[d]."""
    if isinstance(table, QuotientRemainderEmbeddingBagConfig):
        return _quotient_remainder(table, parameters["weight"], raw_id)
    if isinstance(table, CompositionalEmbeddingBagConfig) and table.signed:
        return _count_sketch(table, parameters["weight"], raw_id)
    if type(table) in _COMPUTED:
        pointers = getattr(collection.computed.tables[table.name], "pointers", None)
        return _COMPUTED[type(table)](table, parameters, raw_id, pointers)
    if isinstance(table, CompositionalConfig):
        return _compositional(collection, table, parameters["weight"], raw_id)
    return parameters["weight"][raw_id]


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
            vector = embedding(collection, table, parameters, raw_id)
            total = total + (vector if weights is None else vector * weights[b][i])
        rows.append(total / len(bag) if bag and table.pooling == PoolingType.MEAN else total)
    return torch.stack(rows)


def forward(collection: CCEEmbeddingBagCollection, weights: Parameters, features: KeyedJaggedTensor) -> torch.Tensor:
    """[B, Σ d]: what the collection must return for fixed-stride features. `weights`: table → its physical table."""
    inputs = features.to_dict()
    columns = []
    for table in collection.embedding_bag_configs():
        for feature in table.feature_names:
            bags = [bag.tolist() for bag in inputs[feature].to_dense()]
            sample_weights = inputs[feature].to_dense_weights() if collection.is_weighted() else None
            columns.append(pooled(collection, table, {"weight": weights[table.name]}, bags, sample_weights))
    return torch.cat(columns, dim=1)


def sequences(
    collection: CCEEmbeddingCollection, weights: dict[str, torch.Tensor], features: KeyedJaggedTensor
) -> dict[str, torch.Tensor]:
    """Output → [N, d]: what the unpooled collection must return."""
    inputs = features.to_dict()
    outputs = {}
    for table, names in zip(collection.embedding_configs(), collection.embedding_names_by_table(), strict=True):
        for name, feature in zip(names, table.feature_names, strict=True):
            ids = inputs[feature].values().tolist()
            rows = [embedding(collection, table, {"weight": weights[table.name]}, raw_id) for raw_id in ids]
            outputs[name] = torch.stack(rows) if rows else torch.zeros(0, table.embedding_dim)
    return outputs


def leaf_weights(collection: CCECollection) -> dict[str, torch.Tensor]:
    """Copies of the physical tables that collect gradients of their own."""
    unpooled = isinstance(collection, CCEEmbeddingCollection)
    configs = collection.embedding_configs() if unpooled else collection.embedding_bag_configs()
    return {
        config.name: collection.get_parameter(collection.weight_name(config.name)).detach().clone().requires_grad_()
        for config in configs
    }


def _codes_of(collection: CCECollection, config: CompositionalConfig, raw_id: int) -> list[list[int]]:
    """[c][t] codes of one ID, from the definitions."""
    ids = torch.tensor([raw_id]).numpy()
    if isinstance(config, CCEConfig):
        return [terms[: config.num_codewords] for terms in cce_codes(collection.pointer_map(config.name), raw_id)]
    seed = derive_seed(config.seed, config.name)
    terms = [
        term_hash(seed, p, num_columns=config.num_columns, num_rows=config.num_rows).numpy(ids)[0]
        for p in range(config.num_terms)
    ]
    return [[int(term[j]) for term in terms] for j in range(config.num_columns)]


def cce_codes(pointer_map: PointerMap, raw_id: int) -> list[list[int]]:
    """[c][2] codes of one ID by its map; of one that the map does not know, by the map's policy."""
    known = (
        list(range(pointer_map.num_ids)) if pointer_map.vocabulary is None else pointer_map.vocabulary.keys().tolist()
    )
    position = known.index(raw_id) if raw_id in known else None
    if position is None and pointer_map.unseen == "first_row":
        raw_id, position = known[0], 0
    assert position is not None or pointer_map.unseen == "hash", "an error is due"
    ids = torch.tensor([raw_id]).numpy()
    codebook = pointer_map.codebook_hash.numpy(ids)[0].tolist()
    if position is not None and pointer_map.stored is not None:
        codebook = pointer_map.stored[position].as_py()
    return [list(pair) for pair in zip(codebook, pointer_map.helper_hash.numpy(ids)[0].tolist(), strict=True)]


def _compositional(
    collection: CCECollection, table: CompositionalConfig, weight: torch.Tensor, raw_id: int
) -> torch.Tensor:
    """The concatenation over columns of the sum over terms."""
    k, t = table.num_rows, table.num_terms
    columns = _codes_of(collection, table, raw_id)
    return torch.cat(
        [sum(weight[(t * j + p) * k + code] for p, code in enumerate(terms)) for j, terms in enumerate(columns)]
    )


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
            codeword = parameters["words"][first + code]
            if rows and table.shares_weights:
                codeword = codeword * parameters["weights"][_hash(table, "weights", p, rows, raw_id), 0]
            elif rows:
                row = raw_id if rows >= table.num_embeddings else _hash(table, "weights", 0, rows, raw_id)
                codeword = codeword * parameters["weights"][row, p]
            column = column + codeword
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


def _cafe(table: CafeEmbeddingBagConfig, parameters: Parameters, raw_id: int, _pointers: None) -> torch.Tensor:
    """Before any ID is hot."""
    shared = term_hash(derive_seed(table.seed, table.name), 0, num_columns=1, num_rows=table.num_shared)
    return parameters["weight"][table.num_hot + int(shared.numpy(np.array([raw_id]))[0, 0])]


_COMPUTED: dict[type, Callable[..., torch.Tensor]] = {
    QuotientRemainderProductEmbeddingBagConfig: _product,
    SketchEmbeddingBagConfig: _sketch,
    CafeEmbeddingBagConfig: _cafe,
    DeepHashEmbeddingBagConfig: _deep_hash,
    RobeEmbeddingBagConfig: _robe,
    TensorTrainEmbeddingBagConfig: _tensor_train,
    LowRankEmbeddingBagConfig: _low_rank,
}
