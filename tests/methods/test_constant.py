"""Constants of modules: one copy a device."""

import torch

from torchrec_cce.methods.tensor_hash import Constant


def test_it_is_copied_once_to_a_device() -> None:
    values = torch.arange(3)
    constant = Constant(values)
    assert constant.on(torch.device("cpu")) is values
    other = constant.on(torch.device("meta"))
    assert (other.device.type, other.shape, other.dtype) == ("meta", values.shape, values.dtype)
    assert constant.on(torch.device("meta")) is other
