"""`FlatInteraction`: the interaction of TorchRec's DLRM, at half of its cost."""

import torch
from torchrec.models.dlrm import InteractionArch


class FlatInteraction(InteractionArch):
    """`InteractionArch` to the bit, forward and backward. The pairs of features are picked by one flat index, whose
    gradient is a sum of columns; that of an index for each of two dimensions is a sum of single numbers.
    """

    pairs: torch.Tensor
    """[F·(F + 1) / 2] int64: where the dot product of each pair is in a row of (F + 1)² of them."""

    def __init__(self, num_sparse_features: int) -> None:
        super().__init__(num_sparse_features)
        first, second = self.triu_indices
        self.register_buffer("pairs", first * (self.F + 1) + second, persistent=False)

    def forward(self, dense_features: torch.Tensor, sparse_features: torch.Tensor) -> torch.Tensor:
        """`[B, D]` and `[B, F, D]` to `[B, D + F·(F + 1) / 2]`."""
        features = torch.cat((dense_features.unsqueeze(1), sparse_features), dim=1)
        products = torch.bmm(features, features.transpose(1, 2)).flatten(1)
        return torch.cat((dense_features, products.index_select(1, self.pairs)), dim=1)
