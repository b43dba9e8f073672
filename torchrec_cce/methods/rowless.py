"""Tables without rows: DHE computes on hash values; ROBE and HashedNets read one array of weights at hashed offsets."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_cce.errors import ConfigError
from torchrec_cce.methods.computed import ComputedEmbeddingBagConfig, ComputedTable, parameter
from torchrec_cce.methods.table import MethodSpec, Sizing
from torchrec_cce.methods.tensor_hash import Constant

_HASH_VALUES = 10**6
"""`m` of Kang et al. (2021), section 4.2."""


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

    def build(self, device: torch.device | None = None) -> "DeepHash":
        return DeepHash(self, device)


class DeepHash(ComputedTable):
    """`w` hash values, spread over [-1, 1), through two hidden layers of `w` units with Mish."""

    def __init__(self, config: DeepHashEmbeddingBagConfig, device: torch.device | None = None) -> None:
        super().__init__(config)
        w, d = config.width, config.embedding_dim
        self.layers = nn.ParameterList([parameter(w, units, device=device) for units in (w, w, w, d)])
        self._functions = self._hash("values", num_functions=w, num_rows=_HASH_VALUES)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He's initialisation, and an output of about the spread of a table uniform within ±1/√d, 1/√(3d)."""
        *hidden, last = self.layers
        w, d = last.shape
        for layer in hidden:
            nn.init.normal_(layer, std=(2 / w) ** 0.5)
        # The mean square of a hash value is 1/3, and each hidden layer about keeps it.
        nn.init.normal_(last, std=(w * d) ** -0.5)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        distinct, inverse = ids.unique(return_inverse=True)
        *hidden, last = self.layers
        # Hash values are too large for float16, and spread before they are rounded to it.
        values = self._functions(distinct).to(torch.promote_types(last.dtype, torch.float32))
        units = (values * (2 / _HASH_VALUES) - 1).to(last.dtype)
        for layer in hidden:
            units = nn.functional.mish(units @ layer)
        embeddings: torch.Tensor = (units @ last)[inverse]
        return embeddings


def _dhe(sizing: Sizing) -> EmbeddingBagConfig:
    """The positive root of `3·w² + w·d = max_parameters`, rounded down."""
    d = sizing.table.embedding_dim
    width = (math.isqrt(d * d + 12 * sizing.max_parameters) - d) // 6
    return sizing.make(DeepHashEmbeddingBagConfig, width=sizing.at_least(width, 1, needed=3 + d))


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

    def build(self, device: torch.device | None = None) -> "Robe":
        return Robe(self, device)


class Robe(ComputedTable):
    """Element `i` of block `b` is weight `(offset_b(id) + i) mod P` of the array, times the block's sign."""

    def __init__(self, config: RobeEmbeddingBagConfig, device: torch.device | None = None) -> None:
        super().__init__(config)
        self._init = config.init_fn
        blocks = config.embedding_dim // config.block_size
        self.weights = parameter(config.num_weights, device=device)
        self._offsets = self._hash("offsets", num_functions=blocks, num_rows=config.num_weights)
        self._signs = self._hash("signs", num_functions=blocks, num_rows=2) if config.signed else None
        self._inside = Constant(torch.arange(config.block_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """By the configuration's `init_fn`."""
        if not self.weights.is_meta:
            self._init(self.weights)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        offsets = self._offsets(ids)[:, :, None] + self._inside.on(ids.device)
        blocks = self.weights[offsets % len(self.weights)]  # [N, blocks, block_size]
        if self._signs is not None:
            blocks = blocks * (2 * self._signs(ids) - 1)[:, :, None]
        return blocks.flatten(1)


def _robe(sizing: Sizing) -> EmbeddingBagConfig:
    block = max(1, sizing.table.embedding_dim // sizing.num_columns)
    num_weights = sizing.at_least(sizing.max_parameters, block, needed=block)
    return sizing.make(RobeEmbeddingBagConfig, num_weights=num_weights, block_size=block)


def _hashed_net(sizing: Sizing) -> EmbeddingBagConfig:
    return sizing.make(RobeEmbeddingBagConfig, num_weights=sizing.rows(1), block_size=1, signed=True)


_FAMILY = "quotients and computed tables"
METHODS = (
    MethodSpec(name="dhe", family=_FAMILY, size=_dhe),
    MethodSpec(name="robe", family=_FAMILY, size=_robe),
    MethodSpec(name="hashed_net", family=_FAMILY, size=_hashed_net),
)
