"""How each method spends a cap on the trained parameters of one table, by the rule of its own paper."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_cce.errors import ConfigError
from torchrec_cce.methods.cce import CCEEmbeddingBagConfig
from torchrec_cce.methods.compositional import CompositionalEmbeddingBagConfig
from torchrec_cce.methods.deep_hash import DeepHashEmbeddingBagConfig
from torchrec_cce.methods.low_rank import LowRankEmbeddingBagConfig
from torchrec_cce.methods.quotient_remainder import (
    QuotientRemainderEmbeddingBagConfig,
    QuotientRemainderProductEmbeddingBagConfig,
)
from torchrec_cce.methods.robe import RobeEmbeddingBagConfig
from torchrec_cce.methods.sketch import SketchEmbeddingBagConfig
from torchrec_cce.methods.tensor_train import TensorTrainEmbeddingBagConfig

Method = Literal[
    "full",
    "hashing_trick",
    "ce_sum",
    "ce_concat",
    "ce_hybrid",
    "count_sketch",
    "qr_sum",
    "qr_concat",
    "qr_product",
    "hash_embeddings",
    "dhe",
    "robe",
    "hashed_net",
    "tensor_train",
    "low_rank",
    "cce",
    "cce_helpers",
    "pq",
    "rq",
    "rq_hash_embeddings",
]
METHODS: tuple[Method, ...] = get_args(Method)

_WEIGHTS_A_WORD = 10
"""Rows of importance weights for each word: Svenstrup et al. (2017) want more than 10."""


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """What a table has to be made of."""

    table: EmbeddingBagConfig
    """The full table."""
    method: Method
    cap: int
    """Trained parameters at most."""
    num_columns: int
    num_terms: int | None
    """None: as many as the method usually has."""
    use_helper: bool
    seed: int

    def config(self) -> EmbeddingBagConfig:
        """The configuration of the compressed table.

        Raises:
            ConfigError: the cap is below what the method needs; the message says how much that is.
        """
        return _CONFIGS[self.method](self)

    def terms(self, usual: int) -> int:
        return usual if self.num_terms is None else self.num_terms

    def rows(self, parameters_a_row: int, least: int = 1) -> int:
        """The rows that the cap allows, at least `least`."""
        return self.at_least(self.cap // parameters_a_row, least, least * parameters_a_row)

    def at_least(self, size: int, least: int, needed: int) -> int:
        """`size`, if it is `least` or more."""
        if size < least:
            raise ConfigError(
                f"table {self.table.name!r}: max_parameters={self.cap} is too little for {self.method}; at least "
                f"{needed} are needed for num_embeddings={self.table.num_embeddings} and "
                f"embedding_dim={self.table.embedding_dim}"
            )
        return size

    def make(self, kind: Callable[..., EmbeddingBagConfig], **sizes: Any) -> EmbeddingBagConfig:
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


def _hashed(one: Sizing, *, columns: int | None = None, terms: int = 1, signed: bool = False) -> EmbeddingBagConfig:
    return one.make(
        CompositionalEmbeddingBagConfig,
        num_rows=one.rows(terms * one.table.embedding_dim),
        num_columns=one.num_columns if columns is None else columns,
        num_terms=terms,
        signed=signed,
    )


def _cce(one: Sizing) -> EmbeddingBagConfig:
    # Without helper as many rows as with one, so that the two differ in nothing else.
    return one.make(
        CCEEmbeddingBagConfig,
        num_rows=one.rows(2 * one.table.embedding_dim),
        num_columns=one.num_columns,
        use_helper=one.use_helper,
    )


def _pq(one: Sizing) -> EmbeddingBagConfig:
    return one.make(
        CCEEmbeddingBagConfig,
        num_rows=one.rows(one.table.embedding_dim),
        num_columns=one.num_columns,
        use_helper=False,
    )


def _qr(one: Sizing, operation: str) -> EmbeddingBagConfig:
    d = one.table.embedding_dim
    rows = _quotient_rows(one, d // 2 if operation == "concat" else d)
    if operation == "product":
        return one.make(QuotientRemainderProductEmbeddingBagConfig, num_rows=rows)
    return one.make(QuotientRemainderEmbeddingBagConfig, num_rows=rows, operation=operation)


def _quotient_rows(one: Sizing, width: int) -> int:
    """`m`, the remainders of quotient-remainder: the largest with `m + ⌈n/m⌉` rows of `width` under the cap."""
    n = one.table.num_embeddings
    rows = one.cap // max(1, width)
    smallest = math.isqrt(n - 1) + 1
    least = min(m + -(-n // m) for m in (smallest, max(1, smallest - 1)))
    one.at_least(rows, least, least * width)
    m = (rows + math.isqrt(max(0, rows**2 - 4 * n))) // 2
    while m + -(-n // m) > rows:
        m -= 1
    return m


def _sketch(
    one: Sizing, *, usual_terms: int, stored: int | None, is_weighted: bool, columns: int = 1
) -> EmbeddingBagConfig:
    """`stored` terms have learned pointers; None: all."""
    n, d, t = one.table.num_embeddings, one.table.embedding_dim, one.terms(usual_terms)
    weight_rows = 0
    if is_weighted:
        weights = _WEIGHTS_A_WORD * t * t
        rows = one.rows(t * d + weights)
        weight_rows = _WEIGHTS_A_WORD * t * rows
        if weight_rows > n:  # one for each ID, and words for the rest
            rows, weight_rows = (one.cap - n * t) // (t * d), n
    else:
        rows = one.rows(t * d)
    return one.make(
        SketchEmbeddingBagConfig,
        num_rows=rows,
        num_columns=columns,
        num_terms=t,
        num_stored_terms=t if stored is None else stored,
        num_weight_rows=weight_rows,
    )


def _dhe(one: Sizing) -> EmbeddingBagConfig:
    """The positive root of `3·w² + w·d = cap`, rounded down."""
    d = one.table.embedding_dim
    width = (math.isqrt(d * d + 12 * one.cap) - d) // 6
    return one.make(DeepHashEmbeddingBagConfig, width=one.at_least(width, 1, 3 + d))


def _robe(one: Sizing) -> EmbeddingBagConfig:
    block = max(1, one.table.embedding_dim // one.num_columns)
    return one.make(RobeEmbeddingBagConfig, num_weights=one.at_least(one.cap, block, block), block_size=block)


def _hashed_net(one: Sizing) -> EmbeddingBagConfig:
    return one.make(RobeEmbeddingBagConfig, num_weights=one.at_least(one.cap, 1, 1), block_size=1, signed=True)


def _tensor_train(one: Sizing) -> EmbeddingBagConfig:
    """The positive root of `(n0·d0 + n2·d2)·r + n1·d1·r² = cap`, rounded down."""
    smallest = one.make(TensorTrainEmbeddingBagConfig, rank=1)
    assert isinstance(smallest, TensorTrainEmbeddingBagConfig)
    (n0, n1, n2), (d0, d1, d2) = smallest.row_factors, smallest.column_factors
    linear, square = n0 * d0 + n2 * d2, n1 * d1
    rank = (math.isqrt(linear**2 + 4 * square * one.cap) - linear) // (2 * square)
    rank = one.at_least(rank, 1, smallest.num_parameters)
    return one.make(TensorTrainEmbeddingBagConfig, rank=rank)


def _low_rank(one: Sizing) -> EmbeddingBagConfig:
    each = one.table.num_embeddings + one.table.embedding_dim
    return one.make(LowRankEmbeddingBagConfig, rank=min(one.rows(each), one.table.embedding_dim))


_CONFIGS: dict[Method, Callable[[Sizing], EmbeddingBagConfig]] = {
    "full": lambda one: one.table,
    "hashing_trick": partial(_hashed, columns=1),
    "ce_sum": lambda one: _hashed(one, columns=1, terms=one.terms(2)),
    "ce_concat": _hashed,
    "ce_hybrid": partial(_hashed, terms=2),
    "count_sketch": partial(_hashed, signed=True),
    "qr_sum": partial(_qr, operation="sum"),
    "qr_concat": partial(_qr, operation="concat"),
    "qr_product": partial(_qr, operation="product"),
    "hash_embeddings": partial(_sketch, usual_terms=2, stored=0, is_weighted=True),
    "dhe": _dhe,
    "robe": _robe,
    "hashed_net": _hashed_net,
    "tensor_train": _tensor_train,
    "low_rank": _low_rank,
    "cce": _cce,
    "cce_helpers": lambda one: _sketch(one, usual_terms=3, stored=1, is_weighted=False, columns=one.num_columns),
    "pq": _pq,
    "rq": partial(_sketch, usual_terms=2, stored=None, is_weighted=False),
    "rq_hash_embeddings": partial(_sketch, usual_terms=2, stored=None, is_weighted=True),
}
