"""CCE tables: codewords of a codebook by learned pointers, of a helper by hashes. Without helper: quantized tables."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, EmbeddingBagConfig, EmbeddingConfig

from torchrec_cce.errors import ConfigError
from torchrec_cce.hashing import derive_seed
from torchrec_cce.maps.pointer_format import MinPointerBits, PointerFormat
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.residency import residency_bytes
from torchrec_cce.methods.compositional import (
    CompositionalConfig,
    CompositionalEmbeddingBagConfig,
    CompositionalEmbeddingConfig,
    first_rows,
    refuse_signs,
)
from torchrec_cce.methods.residents import ResidentConfig
from torchrec_cce.methods.table import Looked, MethodSpec, Sizing, TensorRows
from torchrec_cce.methods.tensor_map import TensorMap


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
    residents: ResidentConfig | None = None
    """Find clusters by private rows for some IDs at a time, in place of the helper: then `use_helper` is False, and
    codewords start at zero. None: as the paper does."""
    min_pointer_bits: MinPointerBits = 8
    """The fewest bits that a learned pointer is stored in. A pointer takes 8 bits for up to 256 rows, 16 for up to
    65536, else 32. With 4, it takes 4 for up to 16 rows: two are in a byte, and maps are half as large. It is for maps
    that are made here; one that is attached stays as it is."""

    def __post_init__(self) -> None:
        if self.num_terms != 2:
            raise ConfigError(
                f"table {self.name!r}: num_terms={self.num_terms}; a CCE table has 2, codebook and helper"
            )
        if self.min_pointer_bits not in get_args(MinPointerBits):
            raise ConfigError(f"table {self.name!r}: min_pointer_bits={self.min_pointer_bits!r} is neither 4 nor 8")
        if self.residents is not None:
            self.use_helper = False
            self.init_fn = torch.nn.init.zeros_
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

    def embed(self, weights: npt.NDArray[np.float32], codes: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """[N, d]: the codewords of the codebook in `weights: [2·c·k, d/c]` that have `codes: [N, c]`, side by side."""
        codebooks = weights.reshape(self.num_columns, 2, self.num_rows, -1)[:, 0]
        columns = [codebook[column] for codebook, column in zip(codebooks, codes.T, strict=True)]
        embeddings: npt.NDArray[np.float32] = np.concatenate(columns, axis=1)
        return embeddings

    @property
    def resident_table(self) -> str:
        """The name of the table of the residents' rows."""
        return f"{self.name}_residents"

    @property
    def has_stock_residents(self) -> bool:
        """Whether it has residents whose rows are a stock table of TorchRec's."""
        return self.residents is not None and self.residents.dtype == "float32"

    @property
    def max_residents(self) -> int:
        """How many IDs can have a private row at a time, 0 without residents."""
        return 0 if self.residents is None else self.residents.num_rows(self.num_embeddings)

    @property
    def resident_bytes(self) -> int:
        """Bytes while there are residents: their rows, and see `residency_bytes`."""
        return self.resident_row_bytes + self.residency_bytes

    @property
    def resident_row_bytes(self) -> int:
        """Bytes of the rows of residents, with a float of row-wise Adagrad for each."""
        if self.residents is None:
            return 0
        return int(self.max_residents * (np.dtype(self.residents.dtype).itemsize * self.embedding_dim + 4))

    @property
    def residency_bytes(self) -> int:
        """Bytes in host memory while there are residents: ages and slots of all IDs, and in which order they came."""
        if self.residents is None:
            return 0
        return residency_bytes(self.num_embeddings, self.max_residents if self.residents.are_topped_up else 0)

    def resident_feature_names(self) -> list[str]:
        """The features of that table: `f#table#residents`."""
        return [f"{feature}#{self.name}#residents" for feature in self.feature_names]

    @abstractmethod
    def resident_rows(self) -> BaseEmbeddingConfig:
        """The stock TorchRec table of the residents' rows, which are added to the codewords."""

    def _resident_fields(self) -> dict[str, Any]:
        assert self.residents is not None
        return {
            "name": self.resident_table,
            "num_embeddings": self.max_residents,
            "embedding_dim": self.embedding_dim,
            "feature_names": self.resident_feature_names(),
            "init_fn": torch.nn.init.zeros_,
        }

    @property
    def pointer_format(self) -> PointerFormat:
        """How the pointers of a new map are stored."""
        return PointerFormat.that_holds(self.num_rows, num_columns=self.num_columns, min_bits=self.min_pointer_bits)

    @property
    def pointer_dtype(self) -> np.dtype[np.unsignedinteger]:
        """The width that `num_rows` needs: uint8 up to 256 rows, uint16 up to 65536, else uint32."""
        return self.pointer_format.dtype

    @property
    def pointer_bits(self) -> int:
        return self.pointer_format.bits

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

    def resident_rows(self) -> EmbeddingBagConfig:
        return EmbeddingBagConfig(**self._resident_fields())


@dataclass(kw_only=True)
class CCEEmbeddingConfig(CCEConfig, CompositionalEmbeddingConfig):
    """A clustered table that gives every ID of a sequence an embedding. Sizes and errors: `CCEConfig`."""

    def resident_rows(self) -> EmbeddingConfig:
        return EmbeddingConfig(**self._resident_fields())

    def place_feature_names(self) -> list[str]:
        """What says where in their bags the residents are, whose rows are not pooled: `f#table#places`."""
        return [f"{feature}#{self.name}#places" for feature in self.feature_names]


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

    def on_tensors(self) -> Callable[[torch.Tensor], TensorRows]:
        codes_of = TensorMap(self.pointer_map, use_helper=self.use_helper)
        starts = first_rows(self.num_columns, 2, self.pointer_map.num_rows)  # the helper has its rows, used or not

        def found(ids: torch.Tensor) -> TensorRows:
            codes, known = codes_of(ids)
            return TensorRows(codes + starts.on(ids.device)[:, :, : self.num_terms], known=known)

        return found


def _clustered(sizing: Sizing, *, num_terms: int, **options: Any) -> EmbeddingBagConfig:
    rows = sizing.rows(num_terms * sizing.table.embedding_dim)
    options = {"num_columns": sizing.num_columns, "min_pointer_bits": sizing.min_pointer_bits, **options}
    return sizing.make(CCEEmbeddingBagConfig, num_rows=rows, **options)


METHODS = (
    # CCE without helper has as many rows as with it, so that the two differ in nothing else.
    MethodSpec(
        name="cce", family="CCE", size=lambda sizing: _clustered(sizing, num_terms=2, use_helper=sizing.use_helper)
    ),
    MethodSpec(
        name="cce_residents",
        family="CCE with residents",
        size=lambda sizing: _clustered(sizing, num_terms=1, residents=sizing.residents),
    ),
    MethodSpec(
        name="pq",
        family="pointers learned after training",
        size=lambda sizing: _clustered(sizing, num_terms=1, use_helper=False),
    ),
)
