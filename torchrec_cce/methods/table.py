"""What all methods have in common: a configuration, a scheme that turns raw IDs into rows, and sizes under a limit.

A configuration is what a user writes in place of `torchrec.EmbeddingBagConfig` or `torchrec.EmbeddingConfig`. Like
TorchRec's own it is a dataclass that is not frozen; what it adds is keyword-only and checked where it is built.

A method of the paper that is "pointers into a small table" adds one scheme and nothing else: the remap, the trained
collection and the combination of columns are the same for all.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig

from torchrec_cce.errors import ConfigError
from torchrec_cce.kernels.rows import identity_rows
from torchrec_cce.maps.pointer_format import MinPointerBits
from torchrec_cce.methods.residents import ResidentConfig

MAX_COLUMNS = 32


class Looked(NamedTuple):
    """What `rows_into` found."""

    bad: int = -1
    """Place of the first ID that the table cannot hold, or -1. If there is one, no row in `out` may be used."""
    unseen: int = 0
    """IDs that the map does not know and that got what its policy for them says."""


class TensorRows(NamedTuple):
    """The rows of `[N]` IDs, found by operations of torch alone."""

    rows: torch.Tensor
    """[c, N, t] int64."""
    known: torch.Tensor | None = None
    """[N] bool: which IDs the table can hold, the rows of others being no use; None if it can hold all."""
    signs: torch.Tensor | None = None
    """[c, N, t] float32: what each codeword is multiplied by; None: by nothing."""


class PointerScheme(Protocol):
    """`c` columns of `t` terms: the rows of the physical table whose codewords make up an ID's embedding."""

    @property
    def num_columns(self) -> int: ...

    @property
    def num_terms(self) -> int: ...

    def rows_into(self, ids: npt.NDArray[np.int64], out: npt.NDArray[np.int64]) -> Looked:
        """Write the rows of `ids: [N] int64` to `out: [c, N, t] int64`."""
        ...

    def on_tensors(self) -> Callable[[torch.Tensor], TensorRows]:
        """What finds the rows of `[N] int64` IDs by operations of torch alone: for graphs of these. It holds copies of
        all that it needs, and is slower than `rows_into`."""
        ...


def within(ids: torch.Tensor, num_ids: int) -> torch.Tensor:
    """[N] bool: which of `ids: [N]` are `0..num_ids - 1`."""
    return (ids >= 0) & (ids < num_ids)


@dataclass(frozen=True, kw_only=True)
class FullScheme:
    """The ID is the row."""

    num_ids: int
    num_columns: int = 1
    num_terms: int = 1

    def rows_into(self, ids: npt.NDArray[np.int64], out: npt.NDArray[np.int64]) -> Looked:
        return Looked(bad=identity_rows(ids, self.num_ids, out))

    def on_tensors(self) -> Callable[[torch.Tensor], TensorRows]:
        return lambda ids: TensorRows(ids[None, :, None], known=within(ids, self.num_ids))


@dataclass(kw_only=True)
class CompressedConfig(BaseEmbeddingConfig, ABC):
    """A table of `num_embeddings` raw IDs that is smaller than a row for each.

    Raises:
        ConfigError: the sizes do not fit together; the message names the nearest that do.
    """

    seed: int = 0
    """Of the hash functions. Tables of different names get different functions from one seed."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("a table needs a name")
        self._check_positive(num_embeddings=self.num_embeddings, embedding_dim=self.embedding_dim)
        _fill_in(self)
        for name in (self.name, *self.feature_names):
            if "@" in name:
                raise ConfigError(f"table {self.name!r}: TorchRec reads what follows '@' in {name!r} as a table name")
        super().__post_init__()

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """Trained parameters."""

    @property
    def num_physical_parameters(self) -> int:
        """Values that are held to train those, some of which may be unused."""
        return self.num_parameters

    @property
    def pointer_bits(self) -> int | None:
        """Bits of one learned pointer; None where pointers are not learned."""
        return None

    @property
    def pointer_bytes(self) -> int:
        """Bytes of pointers that are held beside the parameters. Those of a map are in host memory, and not counted."""
        return 0

    @abstractmethod
    def scheme(self) -> PointerScheme:
        """How raw IDs become rows, until a map is attached that says otherwise."""

    @abstractmethod
    def row_feature_names(self) -> list[str]:
        """What `scheme` makes of each feature is under these names, the columns of a feature side by side."""

    def _check_positive(self, **sizes: int) -> None:
        for name, value in sizes.items():
            if value < 1:
                raise ConfigError(f"table {self.name!r}: {name}={value} must be at least 1")

    def _check_columns(self, num_columns: int) -> None:
        """Raise ConfigError unless the embeddings divide into so many columns."""
        allowed = [c for c in range(1, MAX_COLUMNS + 1) if self.embedding_dim % c == 0]
        if num_columns not in allowed:
            raise ConfigError(
                f"table {self.name!r}: num_columns={num_columns} does not divide embedding_dim={self.embedding_dim} "
                f"into 1 to {MAX_COLUMNS} columns; allowed: {', '.join(map(str, allowed))}"
            )


def _fill_in(table: BaseEmbeddingConfig) -> None:
    """Give what is left open a value: features, and bounds of the initialisation, as DLRM has them."""
    if not table.feature_names:
        table.feature_names = [table.name]
    bound = table.embedding_dim**-0.5
    if table.weight_init_max is None:
        table.weight_init_max = bound
    if table.weight_init_min is None:
        table.weight_init_min = -bound


def scheme_of(table: BaseEmbeddingConfig) -> PointerScheme:
    """The scheme that any table starts with; a full one of TorchRec's has a row for every ID."""
    return table.scheme() if isinstance(table, CompressedConfig) else FullScheme(num_ids=table.num_embeddings)


def row_feature_names(table: BaseEmbeddingConfig) -> list[str]:
    """The names of the features of rows that any table makes of its features of raw IDs."""
    return table.row_feature_names() if isinstance(table, CompressedConfig) else list(table.feature_names)


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
    min_pointer_bits: MinPointerBits
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
