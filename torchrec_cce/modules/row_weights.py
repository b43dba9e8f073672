"""The weights of rows in a bag: those of IDs, signs of codewords, and means as weighted sums."""

import numpy as np
import numpy.typing as npt
import torch
from torchrec.modules.embedding_configs import BaseEmbeddingConfig, PoolingType

from torchrec_cce.methods.compositional import SignedScheme
from torchrec_cce.methods.table import PointerScheme


def pools_by_mean(table: BaseEmbeddingConfig) -> bool:
    return bool(getattr(table, "pooling", None) == PoolingType.MEAN)


def weights_of_rows(scheme: PointerScheme, ids: npt.NDArray[np.int64], weights: torch.Tensor) -> torch.Tensor:
    """Of the rows of `ids: [N]`, in their order, from `weights: [N]` of the IDs."""
    if isinstance(scheme, SignedScheme):
        return (torch.from_numpy(scheme.signs(ids)) * weights[:, None]).flatten()
    return weights.repeat_interleave(scheme.num_terms).repeat(scheme.num_columns)
