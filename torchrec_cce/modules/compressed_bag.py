"""`CompressedEmbeddingBag`: a compressed table with the call of PyTorch's `nn.EmbeddingBag`."""

from dataclasses import replace

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_cce.errors import ConfigError
from torchrec_cce.modules.embedding_bag import CCEEmbeddingBagCollection

_FEATURE = "ids"


class CompressedEmbeddingBag(nn.Module):
    """Drops into the `create_emb` and `apply_emb` of the original DLRM, where `nn.EmbeddingBag` was.

    Args:
        config: of any table that `CCEEmbeddingBagCollection` takes; its feature names do not matter.
        device: of the parameters.

    Example:
        >>> from torchrec_cce import CCEEmbeddingBagConfig
        >>> bag = CompressedEmbeddingBag(CCEEmbeddingBagConfig(
        ...     name="user", num_embeddings=10**6, embedding_dim=16, num_rows=100))
        >>> bag(torch.tensor([3, 999_999, 3]), torch.tensor([0, 2])).shape
        torch.Size([2, 16])
    """

    def __init__(self, config: EmbeddingBagConfig, device: torch.device | None = None) -> None:
        super().__init__()
        table = replace(config, feature_names=[_FEATURE])
        self._is_mean = table.pooling == PoolingType.MEAN
        if self._is_mean:  # the weights divide
            table = replace(table, pooling=PoolingType.SUM)
        self.collection = CCEEmbeddingBagCollection([table], is_weighted=True, device=device)

    def forward(
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Pooled embeddings `[B, d]`.

        Args:
            input: raw IDs, int32 or int64: `[B, L]`, bags of `L`, or `[N]` with `offsets`.
            offsets: `[B]`, where each bag begins in `input`, the first at 0.
            per_sample_weights: of the shape of `input`; for sum pooling.

        Raises:
            ConfigError: shapes that do not go together, or weights with mean pooling.
            InvalidIDError: a raw ID outside the table's universe.
        """
        lengths = _lengths(input, offsets)
        if per_sample_weights is None:
            weights = torch.ones(input.numel(), device=input.device)
            if self._is_mean:
                weights = (1 / lengths).repeat_interleave(lengths)
        elif self._is_mean:
            raise ConfigError("per_sample_weights are for sum pooling; this table pools by the mean")
        elif per_sample_weights.shape != input.shape:
            raise ConfigError(
                f"per_sample_weights of shape {tuple(per_sample_weights.shape)} for input {tuple(input.shape)}"
            )
        else:
            weights = per_sample_weights.flatten()
        features = KeyedJaggedTensor(keys=[_FEATURE], values=input.flatten(), lengths=lengths, weights=weights)
        pooled: torch.Tensor = self.collection(features).values()
        return pooled


def _lengths(input: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    """[B] int64: how many IDs are in each bag."""
    if input.dim() == 2 and offsets is None:
        return torch.full((len(input),), input.shape[1], dtype=torch.int64, device=input.device)
    if input.dim() != 1 or offsets is None:
        given = "no offsets" if offsets is None else f"offsets of shape {tuple(offsets.shape)}"
        raise ConfigError(
            f"input of shape {tuple(input.shape)} with {given}; allowed are [B, L] without and [N] with offsets"
        )
    ends = torch.cat([offsets.to(torch.int64), offsets.new_tensor([len(input)], dtype=torch.int64)])
    lengths = ends.diff()
    if (len(offsets) and offsets[0] != 0) or bool((lengths < 0).any()):
        raise ConfigError(
            f"offsets={offsets.tolist()[:8]}… for input of {len(input)} IDs; they begin at 0 and never fall"
        )
    return lengths
