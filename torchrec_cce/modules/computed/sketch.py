"""Sums of words that are chosen by hashes or by stored pointers, and weighed if wanted."""

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import embedding

from torchrec_cce.computed_config import SketchEmbeddingBagConfig
from torchrec_cce.errors import ConfigError
from torchrec_cce.hashing import term_hash
from torchrec_cce.modules.computed.table import ComputedTable, parameter
from torchrec_cce.modules.constant import Constant
from torchrec_cce.modules.tensor_hash import TensorHash


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
