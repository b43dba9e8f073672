"""The interaction of a DLRM against TorchRec's."""

import pytest
import torch
from torchrec.models.dlrm import InteractionArch

from torchrec_cce.training.interaction import FlatInteraction


@pytest.mark.parametrize(("num_features", "width"), [(1, 4), (2, 16), (26, 16), (3, 64)])
def test_it_is_torchrecs_to_the_bit(num_features: int, width: int) -> None:
    torch.manual_seed(0)
    results = []
    for arch in (InteractionArch(num_features), FlatInteraction(num_features)):
        torch.manual_seed(1)
        dense = torch.randn(33, width, requires_grad=True)
        sparse = torch.randn(33, num_features, width, requires_grad=True)
        found = arch(dense, sparse)
        found.backward(torch.randn_like(found))
        results.append((found, dense.grad, sparse.grad))
        assert not arch.state_dict()
    for theirs, ours in zip(*results, strict=True):
        assert torch.equal(theirs, ours)
