"""CCE tables: codewords of a codebook by learned pointers, of a helper by hashes. Without helper: quantized tables."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_cce.errors import ConfigError
from torchrec_cce.hashing import derive_seed
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.methods.compositional import (
    CompositionalConfig,
    CompositionalEmbeddingBagConfig,
    CompositionalEmbeddingConfig,
    refuse_signs,
)
from torchrec_cce.methods.table import Looked, MethodSpec, Sizing


@dataclass(kw_only=True)
class CCEConfig(CompositionalConfig):
    """A table of Clustered Compositional Embeddings (Tsang and Ahle, NeurIPS 2023).

    In each column, a codeword of the codebook, learned by clustering, is added to one of the helper, which is hashed.
    Trained parameters: `2·k·d`, or `k·d` without helper.
    """

    num_columns: int = 4
    num_terms: int = 2
    """Always 2: codebook and helper."""
    use_helper: bool = True
    """False: an ID reads its codewords of the codebook alone. The physical table has its helper rows all the same, as
    zeros, so that maps, versions and placements are those of a table with helper."""

    def __post_init__(self) -> None:
        if self.num_terms != 2:
            raise ConfigError(
                f"table {self.name!r}: num_terms={self.num_terms}; a CCE table has 2, codebook and helper"
            )
        super().__post_init__()

    @property
    def num_codewords(self) -> int:
        return 2 if self.use_helper else 1

    @property
    def num_parameters(self) -> int:
        return int(self.num_codewords * self.num_rows * self.embedding_dim)

    def used_codewords(self, weights: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """`weights: [2·c·k, d/c]`, with zeros for a helper that is not used."""
        if self.use_helper:
            return weights
        used: npt.NDArray[np.float32] = weights.copy()
        used.reshape(self.num_columns, 2, -1)[:, 1] = 0
        return used

    def _physical_fields(self) -> dict[str, Any]:
        fields = super()._physical_fields()
        if not self.use_helper:
            fields["init_fn"] = partial(_init_codebooks, self.init_fn, self.num_columns, self.num_rows)
        return fields

    @property
    def pointer_dtype(self) -> np.dtype[np.unsignedinteger]:
        """The width that `num_rows` needs: uint8 up to 256 rows, uint16 up to 65536, else uint32."""
        return np.dtype(np.uint8 if self.num_rows <= 2**8 else np.uint16 if self.num_rows <= 2**16 else np.uint32)

    @property
    def pointer_bits(self) -> int:
        return 8 * self.pointer_dtype.itemsize

    def scheme(self) -> "CCEScheme":
        """Hashes in place of the pointers, until the first clustering."""
        start = PointerMap.hashed(
            num_ids=self.num_embeddings,
            num_columns=self.num_columns,
            num_rows=self.num_rows,
            seed=derive_seed(self.seed, self.name),
        )
        return self.scheme_with(start)

    def scheme_with(self, pointer_map: PointerMap) -> "CCEScheme":
        """The pointers and helper hashes of `pointer_map`."""
        return CCEScheme(pointer_map=pointer_map, use_helper=self.use_helper)


@dataclass(kw_only=True)
class CCEEmbeddingBagConfig(CCEConfig, CompositionalEmbeddingBagConfig):
    """A clustered table whose IDs come in bags that are pooled. Sizes and errors: `CCEConfig`."""

    def __post_init__(self) -> None:
        refuse_signs(self)
        super().__post_init__()


@dataclass(kw_only=True)
class CCEEmbeddingConfig(CCEConfig, CompositionalEmbeddingConfig):
    """A clustered table that gives every ID of a sequence an embedding. Sizes and errors: `CCEConfig`."""


def _init_codebooks(
    init_fn: Callable[[torch.Tensor], object], num_columns: int, num_rows: int, weight: torch.Tensor
) -> None:
    """Fill a physical table, of zeros in the helper's rows; a shard, of which the rows are not known, all over."""
    init_fn(weight)
    if len(weight) == 2 * num_columns * num_rows:
        with torch.no_grad():
            weight.view(num_columns, 2, -1)[:, 1] = 0


@dataclass(frozen=True, kw_only=True)
class CCEScheme:
    """Codewords of the codebook by the map's pointers, or before the first clustering by a hash; of the helper by a
    hash."""

    pointer_map: PointerMap
    use_helper: bool = True
    """False: codewords of the codebook alone, of a physical table that has its helper rows all the same."""

    @property
    def num_terms(self) -> int:
        return 2 if self.use_helper else 1

    @property
    def num_columns(self) -> int:
        return self.pointer_map.num_columns

    def rows_into(self, ids: npt.NDArray[np.int64], out: npt.NDArray[np.int64]) -> Looked:
        found = self.pointer_map.rows_into(ids, out)
        return Looked(bad=found.bad, unseen=found.num_unseen)


def _clustered(sizing: Sizing, *, num_terms: int, use_helper: bool) -> EmbeddingBagConfig:
    rows = sizing.rows(num_terms * sizing.table.embedding_dim)
    return sizing.make(CCEEmbeddingBagConfig, num_rows=rows, num_columns=sizing.num_columns, use_helper=use_helper)


METHODS = (
    # CCE without helper has as many rows as with it, so that the two differ in nothing else.
    MethodSpec(
        name="cce", family="CCE", size=lambda sizing: _clustered(sizing, num_terms=2, use_helper=sizing.use_helper)
    ),
    MethodSpec(
        name="pq",
        family="pointers learned after training",
        size=lambda sizing: _clustered(sizing, num_terms=1, use_helper=False),
    ),
)
