"""From a cap on parameters to table configurations, as the paper's experiments set them (Reproducibility section)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, get_args

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_cce.config import CCEEmbeddingBagConfig, CompositionalEmbeddingBagConfig
from torchrec_cce.errors import ConfigError

Method = Literal["full", "hashing_trick", "ce_concat", "ce_hybrid", "cce"]
METHODS: tuple[Method, ...] = get_args(Method)


def tables_under_cap(
    tables: Sequence[EmbeddingBagConfig],
    *,
    method: Method,
    max_parameters: int,
    num_columns: int = 4,
    use_helper: bool = True,
    seed: int = 0,
) -> list[EmbeddingBagConfig]:
    """Compress every table whose full size exceeds the cap; the others stay full tables.

    With `max_parameters=8000` and `embedding_dim=16`, a table of a million IDs gets 500 rows by the hashing trick or CE
    concat, and `k = 250` by CE hybrid or CCE, half of whose `2·k·d` parameters are in the second table.

    Args:
        tables: full tables; their names, features, pooling and data type are kept.
        method: how a large table is compressed; `"full"` leaves all as they are.
        max_parameters: the cap on the trained parameters of each table.
        num_columns: columns of `"ce_concat"`, `"ce_hybrid"` and `"cce"`.
        use_helper: `"cce"`: False for codebook words alone, of as many rows.
        seed: of the hash functions.

    Raises:
        ConfigError: unknown method, or a cap below one row.
    """
    if method not in METHODS:
        raise ConfigError(f"method={method!r} is not one of {', '.join(METHODS)}")
    if method == "full":
        return list(tables)
    return [
        table
        if table.num_embeddings * table.embedding_dim <= max_parameters
        else _compress(table, method, max_parameters, num_columns, use_helper, seed)
        for table in tables
    ]


def _compress(
    table: EmbeddingBagConfig, method: Method, max_parameters: int, num_columns: int, use_helper: bool, seed: int
) -> CompositionalEmbeddingBagConfig:
    num_terms = 2 if method in ("ce_hybrid", "cce") else 1
    num_rows = max_parameters // (num_terms * table.embedding_dim)
    if num_rows < 1:
        raise ConfigError(
            f"table {table.name!r}: max_parameters={max_parameters} is below one row of {method}; "
            f"at least {num_terms * table.embedding_dim} are needed for embedding_dim={table.embedding_dim}"
        )
    kind: Callable[..., CompositionalEmbeddingBagConfig] = CompositionalEmbeddingBagConfig
    if method == "cce":
        kind = partial(CCEEmbeddingBagConfig, use_helper=use_helper)
    return kind(
        name=table.name,
        num_embeddings=table.num_embeddings,
        embedding_dim=table.embedding_dim,
        feature_names=list(table.feature_names),
        pooling=table.pooling,
        data_type=table.data_type,
        num_rows=num_rows,
        num_columns=1 if method == "hashing_trick" else num_columns,
        num_terms=num_terms,
        seed=seed,
    )
