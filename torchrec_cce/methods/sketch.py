"""Sketches: Hash Embeddings, residual quantization, and CCE with several helpers, all for comparisons."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import embedding
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_cce.errors import ConfigError
from torchrec_cce.hashing import term_hash
from torchrec_cce.methods.computed import ComputedEmbeddingBagConfig, ComputedTable, parameter
from torchrec_cce.methods.table import MethodSpec, Sizing
from torchrec_cce.methods.tensor_hash import Constant, TensorHash


@dataclass(kw_only=True)
class SketchEmbeddingBagConfig(ComputedEmbeddingBagConfig):
    """`c` columns of `t` summed codewords, each chosen by a hash or by a stored pointer, and weighed if wanted.

    Hash Embeddings (Svenstrup et al. 2017) have `t` hashed codewords with learned weights, residual quantization has
    `t` stored ones, and a CCE table with several helpers one stored and the others hashed. Stored pointers are buffers,
    on every rank and in every checkpoint: this is for comparisons, while CCE's maps are for production.
    """

    num_rows: int
    """`k`: rows of each of the `c·t` small tables."""
    num_columns: int = 1
    num_terms: int = 1
    num_stored_terms: int = 0
    """The first so many terms of each column have stored pointers, random until others are given."""
    num_weight_rows: int = 0
    """Rows of the table of importance weights, one of which each ID reads by a hash, or has to itself where there are
    as many as IDs. 0: codewords are not weighed."""
    shares_words: bool = False
    """All terms of a column read one table of `k` rows."""
    shares_weights: bool = False
    """All terms read one column of weights, each by a hash of its own, instead of one column each by the same hash."""

    def __post_init__(self) -> None:
        self._check_positive(num_rows=self.num_rows, num_terms=self.num_terms)
        super().__post_init__()
        self._check_columns(self.num_columns)
        if not 0 <= self.num_stored_terms <= self.num_terms:
            raise ConfigError(
                f"table {self.name!r}: num_stored_terms={self.num_stored_terms} is not in 0..{self.num_terms}, "
                "the terms that there are"
            )
        if self.num_weight_rows < 0:
            raise ConfigError(f"table {self.name!r}: num_weight_rows={self.num_weight_rows} must be at least 0")

    @property
    def num_parameters(self) -> int:
        codewords: int = self.num_rows * self.embedding_dim * (1 if self.shares_words else self.num_terms)
        return codewords + self.num_weight_rows * (1 if self.shares_weights else self.num_terms)

    @property
    def pointer_dtype(self) -> torch.dtype:
        """Of stored pointers."""
        return torch.uint8 if self.num_rows <= 1 << 8 else torch.int32  # torch has no collectives for 2 bytes

    @property
    def pointer_bits(self) -> int | None:
        return 8 * self.pointer_dtype.itemsize if self.num_stored_terms else None

    @property
    def pointer_bytes(self) -> int:
        pointers = self.num_embeddings * self.num_columns * self.num_stored_terms
        return int(pointers * self.pointer_dtype.itemsize)

    def build(self, device: torch.device | None = None) -> "Sketch":
        return Sketch(self, device)


class Sketch(ComputedTable):
    """`concat_j Σ_p weight_p(id) · words[j, p][pointer_jp(id)]`."""

    pointers: torch.Tensor
    """[n, c, stored terms] uint8 or int32."""

    def __init__(self, config: SketchEmbeddingBagConfig, device: torch.device | None = None) -> None:
        super().__init__(config)
        c, t, k, n = config.num_columns, config.num_terms, config.num_rows, config.num_embeddings
        self._init = config.init_fn
        self._shape = (c, t, config.num_stored_terms)
        tables = 1 if config.shares_words else t
        self.words = parameter(c * tables * k, config.embedding_dim // c, device=device)
        # The first row of the table that term p of column j reads.
        starts = [[(j * tables + min(p, tables - 1)) * k for p in range(t)] for j in range(c)]
        self._starts = Constant(torch.tensor(starts))
        # Hashed terms are those of the other methods, so that CE, Hash Embeddings and CCE start from the same pointers.
        self._hashes = [
            TensorHash(term_hash(self._seed, p, num_columns=c, num_rows=k)) for p in range(config.num_stored_terms, t)
        ]
        self._num_rows = k
        pointers = torch.zeros(n, c, config.num_stored_terms, dtype=config.pointer_dtype, device=device)
        self.register_buffer("pointers", pointers)
        self._weight_hash = None
        self.weights = None
        if config.num_weight_rows:
            self._weights_by_id = config.num_weight_rows >= n
            self.weights = parameter(config.num_weight_rows, 1 if config.shares_weights else t, device=device)
            functions = t if config.shares_weights else 1
            self._weight_hash = self._hash("weights", num_functions=functions, num_rows=config.num_weight_rows)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Codewords by the configuration's `init_fn`, weights 1, and random pointers."""
        if self.words.is_meta:
            return
        self._init(self.words)
        if self.weights is not None:
            torch.nn.init.ones_(self.weights)
        n, c, stored = self.pointers.shape
        ids = np.arange(n, dtype=np.int64)
        for p in range(stored):
            codes = term_hash(self._seed, p, num_columns=c, num_rows=self._num_rows).numpy(ids)
            self.pointers[:, :, p] = torch.from_numpy(codes)

    def store(self, pointers: npt.NDArray[np.integer], words: npt.NDArray[np.float32] | None = None) -> None:
        """Take over learned pointers, and the codewords they point to.

        Args:
            pointers: [n, c, stored terms], each below `num_rows`.
            words: [c, stored terms, k, d/c], the codewords. Those of the other terms become 0, as a helper's do after a
                clustering. None leaves those that there are.

        Raises:
            ConfigError: other shapes, or codewords for terms that share theirs with others.
        """
        c, t, stored = self._shape
        expected = {"pointers": tuple(self.pointers.shape), "words": (c, stored, self._num_rows, self.words.shape[1])}
        for name, given in (("pointers", pointers), ("words", words)):
            if given is not None and given.shape != expected[name]:
                raise ConfigError(f"{name} of shape {given.shape}; this table has {expected[name]}")
        tables = self.words.view(c, -1, self._num_rows, self.words.shape[1])
        if words is not None and tables.shape[1] != t:
            raise ConfigError("the terms share their codewords, which cannot be set for one of them")
        with torch.no_grad():
            self.pointers.copy_(torch.from_numpy(pointers.astype(np.int64)))
            if words is not None:
                tables.zero_()
                tables[:, :stored] = torch.from_numpy(words).to(self.words)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        hashed = [term(ids)[:, :, None] for term in self._hashes]
        codes = torch.cat([self.pointers[ids].to(torch.int64), *hashed], dim=2)  # [N, c, t]
        codewords = embedding(codes + self._starts.on(ids.device), self.words)  # [N, c, t, d/c]
        weights = self._weights_of(ids)
        if weights is not None:
            codewords = codewords * weights[:, None, :, None]
        return codewords.sum(dim=2).flatten(1)

    def _weights_of(self, ids: torch.Tensor) -> torch.Tensor | None:
        """[N, t] or None."""
        if self.weights is None or self._weight_hash is None:
            return None
        if self.weights.shape[1] == 1:
            return self.weights[self._weight_hash(ids), 0]
        rows = ids if self._weights_by_id else self._weight_hash(ids)[:, 0]
        return self.weights[rows]


_WEIGHTS_A_CODEWORD = 10
"""Rows of importance weights for each codeword: Svenstrup et al. (2017) want more than 10."""


def _weighed(sizing: Sizing, *, is_stored: bool) -> EmbeddingBagConfig:
    n, d, t = sizing.table.num_embeddings, sizing.table.embedding_dim, sizing.terms(usual=2)
    rows = sizing.rows(t * d + _WEIGHTS_A_CODEWORD * t * t)
    weight_rows = _WEIGHTS_A_CODEWORD * t * rows
    if weight_rows > n:  # weights for each ID, and codewords for the rest
        rows, weight_rows = (sizing.max_parameters - n * t) // (t * d), n
    return sizing.make(
        SketchEmbeddingBagConfig,
        num_rows=rows,
        num_terms=t,
        num_stored_terms=t if is_stored else 0,
        num_weight_rows=weight_rows,
    )


def _unweighed(sizing: Sizing, *, num_terms: int, **others: int) -> EmbeddingBagConfig:
    rows = sizing.rows(num_terms * sizing.table.embedding_dim)
    return sizing.make(SketchEmbeddingBagConfig, num_rows=rows, num_terms=num_terms, **others)


def _residual(sizing: Sizing) -> EmbeddingBagConfig:
    t = sizing.terms(usual=2)
    return _unweighed(sizing, num_terms=t, num_stored_terms=t)


def _helpers(sizing: Sizing) -> EmbeddingBagConfig:
    return _unweighed(sizing, num_terms=sizing.terms(usual=3), num_columns=sizing.num_columns, num_stored_terms=1)


_LEARNED = "pointers learned after training"
METHODS = (
    MethodSpec(name="hash_embeddings", family="hashing", size=partial(_weighed, is_stored=False)),
    MethodSpec(name="rq", family=_LEARNED, size=_residual),
    MethodSpec(name="rq_hash_embeddings", family=_LEARNED, size=partial(_weighed, is_stored=True)),
    MethodSpec(name="cce_helpers", family="CCE", size=_helpers),
)
