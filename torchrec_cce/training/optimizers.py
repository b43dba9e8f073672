"""The optimizer of the embedding tables: the same mathematics whether FBGEMM fuses it into the backward pass or not."""

from dataclasses import dataclass
from typing import Any

import torch
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_cce.training.config import OptimizerConfig

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
_FUSED = ("sgd", "rowwise_adagrad", "adagrad")
"""Those that FBGEMM fuses on the CPU and on CUDA alike."""
_ADAGRADS = ("rowwise_adagrad", "adagrad")
_EPSILON = 1e-8
"""FBGEMM's, where PyTorch's and TorchRec's Adagrads have 1e-10."""


@dataclass(frozen=True, kw_only=True)
class TableOptimizer:
    """What trains the tables, wherever they are placed: fused, or as `kind(parameters, **arguments)`."""

    kind: type[torch.optim.Optimizer]
    computed_kind: type[torch.optim.Optimizer]
    """Of computed tables, whose parameters' rows are no embeddings: rowwise Adagrad becomes Adagrad."""
    arguments: dict[str, Any]
    can_be_fused: bool
    """Whether FBGEMM does the same in the backward pass. If not, all tables are replicated."""


def table_optimizer(config: OptimizerConfig) -> TableOptimizer:
    arguments: dict[str, Any] = {"lr": config.embedding_learning_rate}
    if config.embedding in _ADAGRADS:
        arguments["eps"] = _EPSILON
    if config.embedding_weight_decay is not None:
        arguments["weight_decay"] = config.embedding_weight_decay
    return TableOptimizer(
        kind=OPTIMIZERS[config.embedding],
        computed_kind=OPTIMIZERS["adagrad" if config.embedding == "rowwise_adagrad" else config.embedding],
        arguments=arguments,
        # FBGEMM takes a weight decay without a word and decays nothing.
        can_be_fused=config.embedding in _FUSED and not config.embedding_weight_decay,
    )
