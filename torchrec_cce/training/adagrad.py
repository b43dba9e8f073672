"""Rowwise Adagrad of replicated tables: TorchRec's, in one pass over each table and its gradient."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_cce.kernels.lookup.update import rowwise_adagrad


class OnePassRowWiseAdagrad(RowWiseAdagrad):
    """TorchRec's, which makes five passes and as many tensors of the size of a table for each step.

    Parameters on the CPU, of float32, without decay of weights or rate, are stepped by a loop of ours; others
    as ever. States are the same.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if closure is not None or not all(map(_is_plain, self.param_groups)):
            return super().step(closure)
        for group in self.param_groups:
            rate, epsilon = np.float32(group["lr"]), np.float32(group["eps"])
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is not None:
                    state = self.state[parameter]
                    state["step"] += 1
                    weights = parameter.detach().numpy()
                    width = (None,) * weights.shape[1]
                    sums = state["sum"].numpy().reshape(-1)
                    rowwise_adagrad(weights, gradient.numpy(), sums, rate, epsilon, width)
        return None


def _is_plain(group: dict[str, Any]) -> bool:
    is_simple = not (group["weight_decay"] or group["lr_decay"] or group["maximize"])
    return is_simple and all(_is_contiguous(each) for each in group["params"])


def _is_contiguous(parameter: torch.Tensor) -> bool:
    tensors = [parameter] if parameter.grad is None else [parameter, parameter.grad]
    return all(each.is_cpu and each.dtype == torch.float32 and each.is_contiguous() for each in tensors)
