"""Steps on touched rows against the optimizers of PyTorch and TorchRec, with dense gradients."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_cce.kernels.lookup.update import adagrad, rowwise_adagrad, sgd

_RATE, _EPSILON = 0.1, 1e-3


@pytest.mark.parametrize(
    ("step", "state_shape", "optimizer"),
    [
        (partial(rowwise_adagrad, width=(None,) * 5), (30,), partial(RowWiseAdagrad, eps=_EPSILON)),
        (adagrad, (30, 5), partial(torch.optim.Adagrad, eps=_EPSILON)),
        (sgd, None, torch.optim.SGD),
    ],
)
def test_steps_equal_those_of_an_optimizer(
    step: Callable[..., None], state_shape: tuple[int, ...] | None, optimizer: Callable[..., torch.optim.Optimizer]
) -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((30, 5)).astype(np.float32)
    parameter = torch.nn.Parameter(torch.from_numpy(weights.copy()))
    theirs = optimizer([parameter], lr=_RATE)
    states = [] if state_shape is None else [np.zeros(state_shape, np.float32)]
    rates = [np.float32(_RATE)] if state_shape is None else [np.float32(_RATE), np.float32(_EPSILON)]
    for _ in range(4):
        gradients = rng.standard_normal((30, 5)).astype(np.float32)
        gradients[rng.random(30) < 0.5] = 0
        parameter.grad = torch.from_numpy(gradients.copy())
        theirs.step()
        step(weights, gradients, *states, *rates)
        np.testing.assert_allclose(weights, parameter.detach().numpy(), rtol=1e-6, atol=1e-6)
        assert not gradients.any()


def test_a_row_that_was_not_touched_stays_even_without_epsilon() -> None:
    weights, gradients = np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32)
    rowwise_adagrad(weights, gradients, np.zeros(2, np.float32), np.float32(1), np.float32(0), (None,) * 3)
    adagrad(weights, gradients, np.zeros((2, 3), np.float32), np.float32(1), np.float32(0))
    assert (weights == 1).all()


def test_a_gradient_that_is_no_number_is_seen_in_the_weights() -> None:
    """As with FBGEMM and TorchRec: training that has gone wrong does not look well."""
    weights, gradients, state = np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32), np.zeros(2, np.float32)
    gradients[1, 2] = np.nan
    rowwise_adagrad(weights, gradients, state, np.float32(1), np.float32(1e-8), (None,) * 3)
    assert (weights[0] == 1).all()
    assert np.isnan(weights[1]).all()
    assert np.isnan(state).tolist() == [False, True]
    assert not gradients.any()
