"""Pointer schemes: how each method turns a raw ID into rows of its physical table.

A method of the paper that is "pointers into a small table" is one class here and nothing else: the remap, the trained
collection and the combination of columns are the same for all.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig

from torchrec_cce.errors import ConfigError
from torchrec_cce.hashing import UniversalHash, derive_seed, term_hash
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.methods.cce import CCEConfig, CCEScheme
from torchrec_cce.methods.compositional import (
    CompositionalConfig,
    CompositionalEmbeddingBagConfig,
    HashedScheme,
    SignedScheme,
)
from torchrec_cce.methods.computed import ComputedEmbeddingBagConfig, ComputedTable
from torchrec_cce.methods.deep_hash import DeepHash, DeepHashEmbeddingBagConfig
from torchrec_cce.methods.low_rank import LowRank, LowRankEmbeddingBagConfig
from torchrec_cce.methods.quotient_remainder import (
    QuotientRemainderEmbeddingBagConfig,
    QuotientRemainderProduct,
    QuotientRemainderProductEmbeddingBagConfig,
    QuotientRemainderScheme,
)
from torchrec_cce.methods.robe import Robe, RobeEmbeddingBagConfig
from torchrec_cce.methods.scheme import FullScheme, PointerScheme
from torchrec_cce.methods.sizing import METHODS, Method, Sizing
from torchrec_cce.methods.sketch import Sketch, SketchEmbeddingBagConfig
from torchrec_cce.methods.tensor_train import TensorTrain, TensorTrainEmbeddingBagConfig


def scheme_of(config: BaseEmbeddingConfig) -> PointerScheme:
    """The scheme that a table starts with."""
    if not isinstance(config, CompositionalConfig):  # a full table, or a computed one, which takes the IDs themselves
        return FullScheme(num_ids=config.num_embeddings)
    seed = derive_seed(config.seed, config.name)
    c, k = config.num_columns, config.num_rows
    if isinstance(config, CCEConfig):
        start = PointerMap.hashed(num_ids=config.num_embeddings, num_columns=c, num_rows=k, seed=seed)
        return CCEScheme(pointer_map=start, use_helper=config.use_helper)
    t = config.num_terms
    if isinstance(config, QuotientRemainderEmbeddingBagConfig):
        return QuotientRemainderScheme(num_ids=config.num_embeddings, num_remainders=k, num_columns=c, num_terms=t)
    terms = tuple(term_hash(seed, term, num_columns=c, num_rows=k) for term in range(t))
    if isinstance(config, CompositionalEmbeddingBagConfig) and config.signed:
        sign_hash = UniversalHash.from_seed(derive_seed(seed, "signs"), num_columns=c * t, num_rows=2)
        return SignedScheme(num_ids=config.num_embeddings, terms=terms, sign_hash=sign_hash)
    return HashedScheme(num_ids=config.num_embeddings, terms=terms)


_TABLES: dict[type[ComputedEmbeddingBagConfig], Any] = {
    QuotientRemainderProductEmbeddingBagConfig: QuotientRemainderProduct,
    SketchEmbeddingBagConfig: Sketch,
    DeepHashEmbeddingBagConfig: DeepHash,
    RobeEmbeddingBagConfig: Robe,
    TensorTrainEmbeddingBagConfig: TensorTrain,
    LowRankEmbeddingBagConfig: LowRank,
}


def computed_table(config: ComputedEmbeddingBagConfig, device: torch.device | None) -> ComputedTable:
    """The table that `config` describes. Raises ConfigError for a kind that has none."""
    if type(config) not in _TABLES:
        known = ", ".join(kind.__name__ for kind in _TABLES)
        raise ConfigError(f"table {config.name!r} is described by a {type(config).__name__}; known are {known}")
    table: ComputedTable = _TABLES[type(config)](config, device)
    return table


def tables_under_cap(
    tables: Sequence[EmbeddingBagConfig],
    *,
    method: Method,
    max_parameters: int,
    num_columns: int = 4,
    num_terms: int | None = None,
    use_helper: bool = True,
    seed: int = 0,
) -> list[EmbeddingBagConfig]:
    """Compress every table whose full size exceeds the cap; the others stay full tables.

    With `max_parameters=8000` and `embedding_dim=16`, a table of a million IDs gets 500 rows by the hashing trick or CE
    concat, and `k = 250` by CE hybrid or CCE, half of whose `2·k·d` parameters are in the second table.

    Args:
        tables: full tables; their names, features, pooling and data type are kept.
        method: how a large table is compressed; `"full"` leaves all as they are. Tables of `"pq"`, `"rq"`,
            `"rq_hash_embeddings"` and `"cce_helpers"` have random pointers until learned ones are given to them.
        max_parameters: the cap on the trained parameters of each table.
        num_columns: columns of the methods that have several; `"robe"`: blocks.
        num_terms: summed words of `"ce_sum"`, `"hash_embeddings"`, `"rq"`, `"rq_hash_embeddings"` (2 if not given) and,
            one of them the codebook's, of `"cce_helpers"` (3).
        use_helper: `"cce"`: False for codebook words alone, of as many rows.
        seed: of the hash functions.

    Raises:
        ConfigError: unknown method, or a cap below the smallest table that the method can make.
    """
    if method not in METHODS:
        raise ConfigError(f"method={method!r} is not one of {', '.join(METHODS)}")
    if method == "full":
        return list(tables)
    return [
        table
        if table.num_embeddings * table.embedding_dim <= max_parameters
        else Sizing(
            table=table,
            method=method,
            cap=max_parameters,
            num_columns=num_columns,
            num_terms=num_terms,
            use_helper=use_helper,
            seed=seed,
        ).config()
        for table in tables
    ]
