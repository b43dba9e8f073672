"""Where tables lie in tensors."""

import numpy as np
import numpy.typing as npt
import torch
from torchrec import KeyedJaggedTensor

from torchrec_cce.kernels.lookup.layout import FeatureTable, Layout
from torchrec_cce.kernels.lookup.pack import Codes
from torchrec_cce.modules.word_lookup import WordLookup


class Rows(WordLookup):
    """Of a table of four rows that lies behind eight floats of another, which has no feature."""

    def __init__(self) -> None:
        table = FeatureTable(
            table=1, source=0, num_columns=1, num_terms=1, bits=64, width=2, table_rows=4, column_rows=0, term_rows=0
        )
        codes = Codes(source=0, first_word=0, bits=64, num_ids=4)
        super().__init__(Layout.of([table]), [codes], num_sources=1, places=[(0, 0), (0, 8)])

    def refuse(self, number: int, ids: npt.NDArray[np.integer], bounds: npt.NDArray[np.int64]) -> None:
        raise AssertionError(number, ids, bounds)


def test_a_tensor_holds_more_than_is_looked_up() -> None:
    rows = Rows()
    floats = torch.arange(16, dtype=torch.float32).view(-1, 1).requires_grad_()
    features = KeyedJaggedTensor.from_lengths_sync(["f"], torch.tensor([3, 3, 1]), torch.tensor([2, 1]))
    for _ in range(3):  # memory that is used again is not zero
        floats.grad = None
        pooled = rows(features, [floats], weighted=False)
        pooled.sum().backward()
        assert pooled.tolist() == [[28, 30], [10, 11]]
        assert floats.grad is not None
        assert floats.grad.flatten().tolist() == [0] * 8 + [0, 0, 1, 1, 0, 0, 2, 2]
