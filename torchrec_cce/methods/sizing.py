"""Methods under a limit on the trained parameters of one table; each spends it by the rule of its own paper."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_cce.errors import ConfigError
from torchrec_cce.methods.residents import ResidentConfig


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """What a method makes a compressed table of: the full table, and what is wanted in its place."""

    table: EmbeddingBagConfig
    """The full table."""
    method: str
    max_parameters: int
    """Trained parameters of the compressed table at most."""
    num_columns: int
    num_terms: int | None
    """None: as many as the method usually has."""
    use_helper: bool
    residents: ResidentConfig
    seed: int

    def terms(self, *, usual: int) -> int:
        """The terms that are wanted, or as many as the method usually has."""
        return usual if self.num_terms is None else self.num_terms

    def rows(self, parameters_a_row: int) -> int:
        """The rows that `max_parameters` allow. Raises ConfigError if that is none."""
        return self.at_least(self.max_parameters // parameters_a_row, 1, needed=parameters_a_row)

    def at_least(self, size: int, least: int, *, needed: int) -> int:
        """`size`. Raises ConfigError, naming the parameters that are needed, if it is below `least`."""
        if size < least:
            raise ConfigError(
                f"table {self.table.name!r}: max_parameters={self.max_parameters} is too little for {self.method}; "
                f"at least {needed} are needed for num_embeddings={self.table.num_embeddings} and "
                f"embedding_dim={self.table.embedding_dim}"
            )
        return size

    def make(self, kind: Callable[..., EmbeddingBagConfig], **sizes: Any) -> EmbeddingBagConfig:
        """The full table as a configuration of another `kind`, which has `sizes`."""
        table = self.table
        return kind(
            name=table.name,
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            feature_names=list(table.feature_names),
            pooling=table.pooling,
            data_type=table.data_type,
            seed=self.seed,
            **sizes,
        )


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """A method, as its file declares it."""

    name: str
    family: str
    """Title of the methods that reports draw together."""
    size: Callable[[Sizing], EmbeddingBagConfig]
    """Makes the configuration. Raises ConfigError if `max_parameters` are fewer than the method needs."""
