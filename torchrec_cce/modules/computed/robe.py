"""ROBE and HashedNets: blocks at hashed offsets of one array of weights."""

import torch

from torchrec_cce.computed_config import RobeEmbeddingBagConfig
from torchrec_cce.modules.computed.table import ComputedTable, parameter
from torchrec_cce.modules.constant import Constant


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
