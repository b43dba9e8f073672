"""A table as a product: low rank has two matrices, TT-Rec three small tensors."""

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import embedding
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_cce.errors import ConfigError
from torchrec_cce.methods.computed import ComputedEmbeddingBagConfig, ComputedTable, parameter
from torchrec_cce.methods.table import MethodSpec, Sizing


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

    def build(self, device: torch.device | None = None) -> "LowRank":
        return LowRank(self, device)


class LowRank(ComputedTable):
    """`rows[id] @ projection`."""

    def __init__(self, config: LowRankEmbeddingBagConfig, device: torch.device | None = None) -> None:
        super().__init__(config)
        self.rows = parameter(config.num_embeddings, config.rank, device=device)
        self.projection = parameter(config.rank, config.embedding_dim, device=device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal, so that a sum of `r` products has the variance 1/(3d) of a table uniform within ±1/√d."""
        r, d = self.projection.shape
        for part in (self.rows, self.projection):
            torch.nn.init.normal_(part, std=(3 * d * r) ** -0.25)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return embedding(ids, self.rows) @ self.projection


def _low_rank(sizing: Sizing) -> EmbeddingBagConfig:
    n, d = sizing.table.num_embeddings, sizing.table.embedding_dim
    return sizing.make(LowRankEmbeddingBagConfig, rank=min(sizing.rows(n + d), d))


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
        divisors = [factor for factor in range(1, d + 1) if d % factor == 0]
        return min(
            ((a, b, d // (a * b)) for a in divisors for b in divisors if d % (a * b) == 0),
            key=lambda factors: (sum(factors), factors),
        )

    @property
    def num_parameters(self) -> int:
        (n0, n1, n2), (d0, d1, d2), r = self.row_factors, self.column_factors, self.rank
        return n0 * d0 * r + n1 * r * d1 * r + n2 * r * d2

    def build(self, device: torch.device | None = None) -> "TensorTrain":
        return TensorTrain(self, device)


def _root_above(value: int, degree: int) -> int:
    """The smallest whole number whose `degree`-th power is at least `value`."""
    root: int = max(1, round(value ** (1 / degree)) - 1)  # not above
    while root**degree < value:
        root += 1
    return root


class TensorTrain(ComputedTable):
    """Each ID is three digits in the mixed radix of the row factors; its embedding is the product of their slices.

    With `d = d0·d1·d2`, element `(a, b, c)` is `Σ_rs core0[i0][a, r] · core1[i1][r, b, s] · core2[i2][s, c]`.
    """

    def __init__(self, config: TensorTrainEmbeddingBagConfig, device: torch.device | None = None) -> None:
        super().__init__(config)
        self._rows, self._columns, self._rank = config.row_factors, config.column_factors, config.rank
        (n0, n1, n2), (d0, d1, d2), r = self._rows, self._columns, self._rank
        self.cores = torch.nn.ParameterList(
            [
                parameter(n0, d0 * r, device=device),
                parameter(n1, r * d1 * r, device=device),
                parameter(n2, r * d2, device=device),
            ]
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal, so that a sum of `r²` products of three has the variance 1/(3d) of a table uniform within ±1/√d."""
        d0, d1, d2 = self._columns
        spread = (3 * d0 * d1 * d2 * self._rank**2) ** (-1 / 6)
        for core in self.cores:
            torch.nn.init.normal_(core, std=spread)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        (_, n1, n2), (d0, d1, d2), r = self._rows, self._columns, self._rank
        digits = (ids // (n1 * n2), ids // n2 % n1, ids % n2)
        first, second, third = (embedding(digit, core) for digit, core in zip(digits, self.cores, strict=True))
        product = torch.bmm(first.view(-1, d0, r), second.view(-1, r, d1 * r))  # [N, d0, d1·r]
        product = torch.bmm(product.view(-1, d0 * d1, r), third.view(-1, r, d2))
        return product.flatten(1)


def _tensor_train(sizing: Sizing) -> EmbeddingBagConfig:
    """The positive root of `(n0·d0 + n2·d2)·r + n1·d1·r² = max_parameters`, rounded down."""
    smallest = sizing.make(TensorTrainEmbeddingBagConfig, rank=1)
    assert isinstance(smallest, TensorTrainEmbeddingBagConfig)
    (n0, n1, n2), (d0, d1, d2) = smallest.row_factors, smallest.column_factors
    linear, square = n0 * d0 + n2 * d2, n1 * d1
    rank = (math.isqrt(linear**2 + 4 * square * sizing.max_parameters) - linear) // (2 * square)
    rank = sizing.at_least(rank, 1, needed=smallest.num_parameters)
    return sizing.make(TensorTrainEmbeddingBagConfig, rank=rank)


_FAMILY = "quotients and computed tables"
METHODS = (
    MethodSpec(name="low_rank", family=_FAMILY, size=_low_rank),
    MethodSpec(name="tensor_train", family=_FAMILY, size=_tensor_train),
)
