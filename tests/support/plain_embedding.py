"""The plain PyTorch reference that the module is compared with: one ID at a time, one word at a time."""

from itertools import pairwise

import torch
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_cce import CCEEmbeddingBagCollection, CCEEmbeddingCollection
from torchrec_cce.hashing import derive_seed, term_hash
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.methods.cce import CCEConfig
from torchrec_cce.methods.compositional import CompositionalConfig
from torchrec_cce.modules.collection import CCECollection


def codes_of(collection: CCECollection, config: CompositionalConfig, raw_id: int) -> list[list[int]]:
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
    row = known.index(raw_id) if raw_id in known else None
    if row is None and pointer_map.unseen == "first_row":
        raw_id, row = known[0], 0
    assert row is not None or pointer_map.unseen == "hash", "an error is due"
    ids = torch.tensor([raw_id]).numpy()
    codebook = pointer_map.codebook_hash.numpy(ids)[0].tolist()
    if row is not None and pointer_map.stored is not None:
        codebook = pointer_map.stored[row].as_py()
    return [list(pair) for pair in zip(codebook, pointer_map.helper_hash.numpy(ids)[0].tolist(), strict=True)]


def embedding(
    collection: CCECollection, config: BaseEmbeddingConfig, weight: torch.Tensor, raw_id: int
) -> torch.Tensor:
    """[d]: the concatenation over columns of the sum over terms."""
    if not isinstance(config, CompositionalConfig):
        return weight[raw_id]
    k, t = config.num_rows, config.num_terms
    columns = codes_of(collection, config, raw_id)
    words = [sum(weight[(t * j + p) * k + code] for p, code in enumerate(terms)) for j, terms in enumerate(columns)]
    return torch.cat(words)


def forward(
    collection: CCEEmbeddingBagCollection, weights: dict[str, torch.Tensor], features: KeyedJaggedTensor
) -> torch.Tensor:
    """[B, Σ d]: what the collection must return for fixed-stride features."""
    inputs = features.to_dict()
    columns = []
    for config in collection.embedding_bag_configs():
        for feature in config.feature_names:
            offsets = inputs[feature].offsets().tolist()
            values = inputs[feature].values().tolist()
            sample_weights = inputs[feature].weights() if collection.is_weighted() else None
            bags = []
            for start, end in pairwise(offsets):
                bag = torch.zeros(config.embedding_dim)
                for i in range(start, end):
                    word = embedding(collection, config, weights[config.name], values[i])
                    bag = bag + (word if sample_weights is None else word * sample_weights[i])
                mean = config.pooling == PoolingType.MEAN and end > start
                bags.append(bag / (end - start) if mean else bag)
            columns.append(torch.stack(bags))
    return torch.cat(columns, dim=1)


def sequences(
    collection: CCEEmbeddingCollection, weights: dict[str, torch.Tensor], features: KeyedJaggedTensor
) -> dict[str, torch.Tensor]:
    """Output → [N, d]: what the unpooled collection must return."""
    inputs = features.to_dict()
    outputs = {}
    for config, names in zip(collection.embedding_configs(), collection.embedding_names_by_table(), strict=True):
        for name, feature in zip(names, config.feature_names, strict=True):
            ids = inputs[feature].values().tolist()
            rows = [embedding(collection, config, weights[config.name], raw_id) for raw_id in ids]
            outputs[name] = torch.stack(rows) if rows else torch.zeros(0, config.embedding_dim)
    return outputs


def leaf_weights(collection: CCECollection) -> dict[str, torch.Tensor]:
    """Copies of the physical tables that collect gradients of their own."""
    unpooled = isinstance(collection, CCEEmbeddingCollection)
    configs = collection.embedding_configs() if unpooled else collection.embedding_bag_configs()
    return {
        config.name: collection.get_parameter(collection.weight_name(config.name)).detach().clone().requires_grad_()
        for config in configs
    }
