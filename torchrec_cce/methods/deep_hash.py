"""DHE: an MLP on hash values of the raw ID."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from torchrec_cce.methods.computed import ComputedEmbeddingBagConfig, ComputedTable, parameter
from torchrec_cce.methods.table import MethodSpec, Sizing


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


_HASH_VALUES = 10**6
"""`m` of Kang et al. (2021), section 4.2."""


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
        units = self._functions(distinct).to(last.dtype) * (2 / _HASH_VALUES) - 1
        for layer in hidden:
            units = nn.functional.mish(units @ layer)
        embeddings: torch.Tensor = (units @ last)[inverse]
        return embeddings


def _dhe(sizing: Sizing) -> EmbeddingBagConfig:
    """The positive root of `3·w² + w·d = max_parameters`, rounded down."""
    d = sizing.table.embedding_dim
    width = (math.isqrt(d * d + 12 * sizing.max_parameters) - d) // 6
    return sizing.make(DeepHashEmbeddingBagConfig, width=sizing.at_least(width, 1, needed=3 + d))


METHODS = (MethodSpec(name="dhe", family="quotients and computed tables", size=_dhe),)
