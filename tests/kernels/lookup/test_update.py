"""A step on a table against TorchRec's optimizer, with dense gradients."""

import numpy as np
import pytest
import torch
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_cce.kernels.lookup.update import rowwise_adagrad

_RATE, _EPSILON = 0.1, 1e-3


@pytest.mark.parametrize("width", [1, 5, 8])
@pytest.mark.parametrize("touched", [0.01, 0.5])
def test_steps_equal_those_of_an_optimizer(width: int, touched: float) -> None:
    rng = np.random.default_rng(0)
    weights, state = rng.standard_normal((300, width)).astype(np.float32), np.zeros(300, np.float32)
    parameter = torch.nn.Parameter(torch.from_numpy(weights.copy()))
    theirs = RowWiseAdagrad([parameter], lr=_RATE, eps=_EPSILON)
    for _ in range(4):
        gradients = rng.standard_normal((300, width)).astype(np.float32)
        gradients[rng.random(300) >= touched] = 0
        parameter.grad = torch.from_numpy(gradients.copy())
        theirs.step()
        rowwise_adagrad(weights, gradients, state, np.float32(_RATE), np.float32(_EPSILON), (None,) * width)
        np.testing.assert_allclose(weights, parameter.detach().numpy(), rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(gradients, parameter.grad)


@pytest.mark.parametrize("num_touched", [1, 50])
def test_a_row_that_was_not_touched_stays_even_without_epsilon(num_touched: int) -> None:
    weights, gradients = np.ones((70, 3), np.float32), np.zeros((70, 3), np.float32)
    gradients[:num_touched] = 2
    state = np.zeros(70, np.float32)
    rowwise_adagrad(weights, gradients, state, np.float32(1), np.float32(0), (None,) * 3)
    assert (weights[:num_touched] == 0).all()
    assert (weights[num_touched:] == 1).all()
    assert (state == [4] * num_touched + [0] * (70 - num_touched)).all()


def test_a_gradient_that_is_no_number_is_seen_in_the_weights() -> None:
    """As with FBGEMM and TorchRec: training that has gone wrong does not look well."""
    weights, gradients, state = np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32), np.zeros(2, np.float32)
    gradients[1, 2] = np.nan
    rowwise_adagrad(weights, gradients, state, np.float32(1), np.float32(1e-8), (None,) * 3)
    assert (weights[0] == 1).all()
    assert np.isnan(weights[1]).all()
    assert np.isnan(state).tolist() == [False, True]
