"""From a cap on parameters to table configurations, as the paper's experiments set them (Reproducibility section)."""

from collections.abc import Sequence

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_cce.errors import ConfigError
from torchrec_cce.sizing import METHODS, Method, Sizing


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
