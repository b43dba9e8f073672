"""Table configurations: what a user writes instead of `torchrec.EmbeddingBagConfig` and `torchrec.EmbeddingConfig`.

They are dataclasses like TorchRec's own (and therefore not frozen), keyword-only in what they add, and checked where
they are built.
"""

from torchrec.modules.embedding_configs import BaseEmbeddingConfig

from torchrec_cce.errors import ConfigError

MAX_COLUMNS = 32


def prepare_table(table: BaseEmbeddingConfig) -> None:
    """Fill in what TorchRec's configurations leave open, and raise ConfigError for names and sizes that cannot be."""
    if not table.name:
        raise ConfigError("a table needs a name")
    if not table.feature_names:
        table.feature_names = [table.name]
    for name in (table.name, *table.feature_names):
        if "@" in name:
            raise ConfigError(f"table {table.name!r}: TorchRec reads what follows '@' in {name!r} as a table name")
    for size in ("num_embeddings", "embedding_dim"):
        if getattr(table, size) < 1:
            raise ConfigError(f"table {table.name!r}: {size}={getattr(table, size)} must be at least 1")
    bound = table.embedding_dim**-0.5
    if table.weight_init_max is None:
        table.weight_init_max = bound
    if table.weight_init_min is None:
        table.weight_init_min = -bound


def check_columns(table: BaseEmbeddingConfig, num_columns: int) -> None:
    """Raise ConfigError unless a table's embeddings divide into so many columns."""
    allowed = [c for c in range(1, MAX_COLUMNS + 1) if table.embedding_dim % c == 0]
    if num_columns not in allowed:
        raise ConfigError(
            f"table {table.name!r}: num_columns={num_columns} does not divide embedding_dim={table.embedding_dim} "
            f"into 1 to {MAX_COLUMNS} columns; allowed: {', '.join(map(str, allowed))}"
        )
