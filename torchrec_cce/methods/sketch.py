"""Configurations of tables whose embeddings are computed from the raw ID and shared parameters, not looked up as rows.

A stock TorchRec table cannot hold them. They are small, and every rank has a replica.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import embedding

from torchrec_cce.errors import ConfigError
from torchrec_cce.hashing import term_hash
from torchrec_cce.methods.computed import ComputedEmbeddingBagConfig, ComputedTable, parameter
from torchrec_cce.methods.table import check_columns
from torchrec_cce.methods.tensor_hash import Constant, TensorHash


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
        dtype = torch.uint8 if k <= 1 << 8 else torch.int32
        self._num_rows = k
        self.register_buffer("pointers", torch.zeros(n, c, config.num_stored_terms, dtype=dtype, device=device))
        self._weight_hash = None
        self.weights = None
        if config.num_weight_rows:
            self._one_each = config.num_weight_rows >= n
            self.weights = parameter(config.num_weight_rows, 1 if config.shares_weights else t, device=device)
            functions = t if config.shares_weights else 1
            self._weight_hash = self._hash("weights", num_functions=functions, num_rows=config.num_weight_rows)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Words by the configuration's `init_fn`, weights 1, and random pointers."""
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
        """Take over learned pointers, and the words they point to.

        Args:
            pointers: [n, c, stored terms], each below `num_rows`.
            words: [c, stored terms, k, d/c]. The words of the other terms become 0, as a helper's after a clustering.
                None leaves those that there are.

        Raises:
            ConfigError: other shapes, or words for terms that share theirs with others.
        """
        c, t, stored = self._shape
        expected = {"pointers": tuple(self.pointers.shape), "words": (c, stored, self._num_rows, self.words.shape[1])}
        for name, given in (("pointers", pointers), ("words", words)):
            if given is not None and given.shape != expected[name]:
                raise ConfigError(f"{name} of shape {given.shape}; this table has {expected[name]}")
        tables = self.words.view(c, -1, self._num_rows, self.words.shape[1])
        if words is not None and tables.shape[1] != t:
            raise ConfigError("the terms share their words, which cannot be set for one of them")
        with torch.no_grad():
            self.pointers.copy_(torch.from_numpy(pointers.astype(np.int64)))
            if words is not None:
                tables.zero_()
                tables[:, :stored] = torch.from_numpy(words).to(self.words)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        hashed = [one(ids)[:, :, None] for one in self._hashes]
        codes = torch.cat([self.pointers[ids].to(torch.int64), *hashed], dim=2)  # [N, c, t]
        words = embedding(codes + self._starts.on(ids.device), self.words)  # [N, c, t, d/c]
        weights = self._weights_of(ids)
        if weights is not None:
            words = words * weights[:, None, :, None]
        return words.sum(dim=2).flatten(1)

    def _weights_of(self, ids: torch.Tensor) -> torch.Tensor | None:
        """[N, t] or None."""
        if self.weights is None or self._weight_hash is None:
            return None
        if self.weights.shape[1] == 1:
            return self.weights[self._weight_hash(ids), 0]
        rows = ids if self._one_each else self._weight_hash(ids)[:, 0]
        return self.weights[rows]
