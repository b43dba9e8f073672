"""The sharders of a model with CCE collections."""

from typing import Any

from torch import nn
from torchrec.distributed.types import ModuleSharder, QuantizedCommCodecs

from torchrec_cce.sharding.sequence import CCEEmbeddingCollectionSharder
from torchrec_cce.sharding.sharder import CCEEmbeddingBagCollectionSharder


def get_cce_sharders(
    *,
    fused_params: dict[str, Any] | None = None,
    qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
) -> list[ModuleSharder[nn.Module]]:
    """The sharders for a planner and a `DistributedModelParallel` of a model with CCE collections, on CPU or CUDA.

    Tables of plain `EmbeddingBagCollection`s and `EmbeddingCollection`s in the same model are sharded by them, too.

    Args:
        fused_params: arguments of FBGEMM's fused kernels, as of the stock sharders.
        qcomm_codecs_registry: quantised communication, as of the stock sharders.
    """
    return [
        CCEEmbeddingBagCollectionSharder(fused_params=fused_params, qcomm_codecs_registry=qcomm_codecs_registry),
        CCEEmbeddingCollectionSharder(fused_params=fused_params, qcomm_codecs_registry=qcomm_codecs_registry),
    ]
