"""Rowwise Adagrad in one pass against TorchRec's."""

import pytest
import torch
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_cce.training.adagrad import OnePassRowWiseAdagrad


@pytest.mark.parametrize("arguments", [{"lr": 0.1, "eps": 1e-8}, {"lr": 0.1, "weight_decay": 0.1, "lr_decay": 0.01}])
def test_steps_and_states_are_those_of_torchrec(arguments: dict[str, float]) -> None:
    """Also of rows that a step does not touch, and of a table without a gradient."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(9, width, generator=generator) for width in (4, 3, 2)]
    mine, theirs = ([torch.nn.Parameter(each.clone()) for each in start] for _ in range(2))
    optimizers = OnePassRowWiseAdagrad(mine, **arguments), RowWiseAdagrad(theirs, **arguments)
    for step in range(5):
        for pair in list(zip(mine, theirs, strict=True))[step % 2 :]:
            gradient = torch.randn(pair[0].shape, generator=generator) * (torch.rand(9, 1, generator=generator) < 0.5)
            for parameter in pair:
                parameter.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for pair in zip(mine, theirs, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-6)
        found, expected = (optimizer.state[each] for optimizer, each in zip(optimizers, pair, strict=True))
        assert found.keys() == expected.keys()
        torch.testing.assert_close(found["sum"], expected["sum"], rtol=1e-6, atol=0)
        assert found["step"] == expected["step"]
