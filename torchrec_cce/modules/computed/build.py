"""From a configuration to its computed table."""

from typing import Any

import torch

from torchrec_cce.computed_config import (
    ComputedEmbeddingBagConfig,
    DeepHashEmbeddingBagConfig,
    LowRankEmbeddingBagConfig,
    QuotientRemainderProductEmbeddingBagConfig,
    RobeEmbeddingBagConfig,
    SketchEmbeddingBagConfig,
    TensorTrainEmbeddingBagConfig,
)
from torchrec_cce.errors import ConfigError
from torchrec_cce.modules.computed.deep_hash import DeepHash
from torchrec_cce.modules.computed.low_rank import LowRank
from torchrec_cce.modules.computed.quotient_remainder import QuotientRemainderProduct
from torchrec_cce.modules.computed.robe import Robe
from torchrec_cce.modules.computed.sketch import Sketch
from torchrec_cce.modules.computed.table import ComputedTable
from torchrec_cce.modules.computed.tensor_train import TensorTrain

_TABLES: dict[type[ComputedEmbeddingBagConfig], Any] = {
    QuotientRemainderProductEmbeddingBagConfig: QuotientRemainderProduct,
    SketchEmbeddingBagConfig: Sketch,
    DeepHashEmbeddingBagConfig: DeepHash,
    RobeEmbeddingBagConfig: Robe,
    TensorTrainEmbeddingBagConfig: TensorTrain,
    LowRankEmbeddingBagConfig: LowRank,
}


def computed_table(config: ComputedEmbeddingBagConfig, device: torch.device | None) -> ComputedTable:
    """The table that `config` describes. Raises ConfigError for a kind that has none."""
    if type(config) not in _TABLES:
        known = ", ".join(kind.__name__ for kind in _TABLES)
        raise ConfigError(f"table {config.name!r} is described by a {type(config).__name__}; known are {known}")
    table: ComputedTable = _TABLES[type(config)](config, device)
    return table
