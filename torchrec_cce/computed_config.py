"""Configurations of tables whose embeddings are computed from the raw ID and shared parameters, not looked up as rows.

A stock TorchRec table cannot hold them. They are small, and every rank has a replica.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_cce.config import check_columns, prepare_table
from torchrec_cce.errors import ConfigError


@dataclass(kw_only=True)
class ComputedEmbeddingBagConfig(EmbeddingBagConfig, ABC):
    """A table of `num_embeddings` raw IDs whose embeddings are computed.

    Raises:
        ConfigError: the sizes do not fit together; the message names the nearest that do.
    """

    seed: int = 0
    """Of the hash functions. Tables of different names get different functions from one seed."""

    def __post_init__(self) -> None:
        prepare_table(self)
        super().__post_init__()

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """Trained parameters."""

    @property
    def pointer_bytes(self) -> int:
        """Bytes of stored index pointers."""
        return 0

    def id_feature_names(self) -> list[str]:
        """What the raw IDs of each feature are called on their way to the table: `f#table`."""
        return [f"{feature}#{self.name}" for feature in self.feature_names]

    def _check_positive(self, **sizes: int) -> None:
        for name, value in sizes.items():
            if value < 1:
                raise ConfigError(f"table {self.name!r}: {name}={value} must be at least 1")


@dataclass(kw_only=True)
class QuotientRemainderProductEmbeddingBagConfig(ComputedEmbeddingBagConfig):
    """The elementwise product of a word for `id % m` and one for `id // m` (Shi et al. 2020)."""

    num_rows: int
    """`m`: rows for remainders. There are `⌈n/m⌉` for quotients."""

    def __post_init__(self) -> None:
        self._check_positive(num_rows=self.num_rows)
        super().__post_init__()

    @property
    def num_quotients(self) -> int:
        return int(-(-self.num_embeddings // self.num_rows))

    @property
    def num_parameters(self) -> int:
        return int((self.num_rows + self.num_quotients) * self.embedding_dim)


@dataclass(kw_only=True)
class SketchEmbeddingBagConfig(ComputedEmbeddingBagConfig):
    """`c` columns of `t` summed words, each word chosen by a hash or by a stored pointer, and weighed if wanted.

    Hash Embeddings (Svenstrup et al. 2017) are `t` hashed words with learned weights; residual quantization `t` stored
    ones; a CCE table with several helpers one stored and the others hashed. Stored pointers are buffers, on every rank
    and in every checkpoint: this is for comparisons, while CCE's maps are for production.
    """

    num_rows: int
    """`k`: rows of each of the `c·t` small tables."""
    num_columns: int = 1
    num_terms: int = 1
    num_stored_terms: int = 0
    """The first so many terms of each column have stored pointers, random until others are given."""
    num_weight_rows: int = 0
    """Rows of the table of importance weights, one of which each ID reads by a hash, or has to itself where there are
    as many as IDs. 0: words are not weighed."""
    shares_words: bool = False
    """All terms of a column read one table of `k` rows."""
    shares_weights: bool = False
    """All terms read one column of weights, each by a hash of its own, instead of one column each by the same hash."""

    def __post_init__(self) -> None:
        self._check_positive(num_rows=self.num_rows, num_terms=self.num_terms)
        super().__post_init__()
        check_columns(self, self.num_columns)
        if not 0 <= self.num_stored_terms <= self.num_terms:
            raise ConfigError(
                f"table {self.name!r}: num_stored_terms={self.num_stored_terms} is not in 0..{self.num_terms}, "
                "the terms that there are"
            )
        if self.num_weight_rows < 0:
            raise ConfigError(f"table {self.name!r}: num_weight_rows={self.num_weight_rows} must be at least 0")

    @property
    def num_parameters(self) -> int:
        words: int = self.num_rows * self.embedding_dim * (1 if self.shares_words else self.num_terms)
        return words + self.num_weight_rows * (1 if self.shares_weights else self.num_terms)

    @property
    def pointer_bytes(self) -> int:
        width = 1 if self.num_rows <= 1 << 8 else 4  # torch has no collectives for 2 bytes
        return int(self.num_embeddings * self.num_columns * self.num_stored_terms * width)


@dataclass(kw_only=True)
class DeepHashEmbeddingBagConfig(ComputedEmbeddingBagConfig):
    """DHE (Kang et al. 2021): an MLP with Mish on many hash values of the ID; no table at all.

    As the paper sizes it (Reproducibility section): two hidden layers, as many hashes as units, no biases, so that
    `3·w² + w·d` parameters are trained.
    """

    width: int
    """`w`: hash values, and units of each hidden layer."""

    def __post_init__(self) -> None:
        self._check_positive(width=self.width)
        super().__post_init__()

    @property
    def num_parameters(self) -> int:
        return int(3 * self.width**2 + self.width * self.embedding_dim)


@dataclass(kw_only=True)
class RobeEmbeddingBagConfig(ComputedEmbeddingBagConfig):
    """ROBE (Desai et al. 2022): blocks of one circular array of weights, each at a hashed offset, side by side.

    With blocks of one weight, and signs, these are HashedNets (Chen et al. 2015).
    """

    num_weights: int
    """Length of the array."""
    block_size: int
    """Weights in a block; a divisor of `embedding_dim`."""
    signed: bool = False
    """Multiply each block by +1 or -1, chosen by another hash."""

    def __post_init__(self) -> None:
        self._check_positive(num_weights=self.num_weights, block_size=self.block_size)
        super().__post_init__()
        allowed = [size for size in range(1, self.embedding_dim + 1) if self.embedding_dim % size == 0]
        if self.block_size not in allowed:
            raise ConfigError(
                f"table {self.name!r}: block_size={self.block_size} does not divide embedding_dim="
                f"{self.embedding_dim}; allowed: {', '.join(map(str, allowed))}"
            )
        if self.num_weights < self.block_size:
            raise ConfigError(
                f"table {self.name!r}: num_weights={self.num_weights} is below block_size={self.block_size}, one block"
            )

    @property
    def num_parameters(self) -> int:
        return self.num_weights


@dataclass(kw_only=True)
class TensorTrainEmbeddingBagConfig(ComputedEmbeddingBagConfig):
    """TT-Rec (Yin et al. 2021): the table as a product of three small tensors, the IDs' digits picking the slices."""

    rank: int
    """`r`: of both bonds between the three cores."""

    def __post_init__(self) -> None:
        self._check_positive(rank=self.rank)
        super().__post_init__()

    @property
    def row_factors(self) -> tuple[int, int, int]:
        """Three numbers of about equal size whose product is at least `num_embeddings`."""
        n = self.num_embeddings
        first = _root_above(n, 3)
        second = _root_above(-(-n // first), 2)
        return first, second, -(-n // (first * second))

    @property
    def column_factors(self) -> tuple[int, int, int]:
        """Three numbers, as equal as they can be, whose product is `embedding_dim`."""
        d = self.embedding_dim
        divisors = [one for one in range(1, d + 1) if d % one == 0]
        return min(
            ((a, b, d // (a * b)) for a in divisors for b in divisors if d % (a * b) == 0),
            key=lambda factors: (sum(factors), factors),
        )

    @property
    def num_parameters(self) -> int:
        (n0, n1, n2), (d0, d1, d2), r = self.row_factors, self.column_factors, self.rank
        return n0 * d0 * r + n1 * r * d1 * r + n2 * r * d2


@dataclass(kw_only=True)
class LowRankEmbeddingBagConfig(ComputedEmbeddingBagConfig):
    """A table `[n, r]` of narrow rows times a matrix `[r, d]`."""

    rank: int
    """`r`: 1 to `embedding_dim`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.rank <= self.embedding_dim:
            raise ConfigError(f"table {self.name!r}: rank={self.rank} is not in 1..{self.embedding_dim}, embedding_dim")

    @property
    def num_parameters(self) -> int:
        return int(self.rank * (self.num_embeddings + self.embedding_dim))


def _root_above(value: int, degree: int) -> int:
    """The smallest whole number whose `degree`-th power is at least `value`."""
    root: int = max(1, round(value ** (1 / degree)) - 1)  # not above
    while root**degree < value:
        root += 1
    return root
