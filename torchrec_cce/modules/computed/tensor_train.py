"""TT-Rec: a table as a product of three small tensors."""

import torch
from torch.nn.functional import embedding

from torchrec_cce.computed_config import TensorTrainEmbeddingBagConfig
from torchrec_cce.modules.computed.table import ComputedTable, parameter


class TensorTrain(ComputedTable):
    """Each ID is three digits in the mixed radix of the row factors; its embedding is the product of their slices.

    With `d = d0·d1·d2`, element `(a, b, c)` is `Σ_rs core0[i0][a, r] · core1[i1][r, b, s] · core2[i2][s, c]`.
    """

    def __init__(self, config: TensorTrainEmbeddingBagConfig, device: torch.device | None = None) -> None:
        super().__init__(config)
        self._rows, self._columns, self._rank = config.row_factors, config.column_factors, config.rank
        (n0, n1, n2), (d0, d1, d2), r = self._rows, self._columns, self._rank
        self.cores = torch.nn.ParameterList(
            [
                parameter(n0, d0 * r, device=device),
                parameter(n1, r * d1 * r, device=device),
                parameter(n2, r * d2, device=device),
            ]
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal, so that a sum of `r²` products of three has the variance 1/(3d) of a table uniform within ±1/√d."""
        d0, d1, d2 = self._columns
        spread = (3 * d0 * d1 * d2 * self._rank**2) ** (-1 / 6)
        for core in self.cores:
            torch.nn.init.normal_(core, std=spread)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        (_, n1, n2), (d0, d1, d2), r = self._rows, self._columns, self._rank
        digits = (ids // (n1 * n2), ids // n2 % n1, ids % n2)
        first, second, third = (embedding(digit, core) for digit, core in zip(digits, self.cores, strict=True))
        product = torch.bmm(first.view(-1, d0, r), second.view(-1, r, d1 * r))  # [N, d0, d1·r]
        product = torch.bmm(product.view(-1, d0 * d1, r), third.view(-1, r, d2))
        return product.flatten(1)
