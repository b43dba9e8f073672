"""Tensors that a module computes with and that are no state of it."""

import torch


class Constant:
    """`values`, copied once to each device that asks.

    No buffer, for those lose their values when a module is built on the meta device and materialised later.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self._copies = {values.device: values}

    def on(self, device: torch.device) -> torch.Tensor:
        """The values on `device`."""
        if device not in self._copies:
            (first, *_) = self._copies.values()
            self._copies[device] = first.to(device)
        return self._copies[device]
