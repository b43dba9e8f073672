"""The models that the embeddings feed: TorchRec's DLRM, and GMF for logs of users and items."""

import torch
from torch import nn
from torchrec import KeyedTensor
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM

from torchrec_cce.modules.embedding_bag import CCEEmbeddingBagCollection
from torchrec_cce.training.config import RunConfig


class DLRMClicks(nn.Module):
    """TorchRec's DLRM on a `Batch`. A log without dense features gets one that is always zero, as DLRM needs one."""

    def __init__(self, collection: CCEEmbeddingBagCollection, num_dense: int, config: RunConfig) -> None:
        super().__init__()
        self._num_dense = num_dense
        self.dlrm = DLRM(
            collection,
            dense_in_features=max(1, num_dense),
            dense_arch_layer_sizes=[*config.model.bottom, config.embedding.dim],
            over_arch_layer_sizes=[*config.model.top, 1],
        )

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits `[B]`."""
        dense = batch.dense_features
        if self._num_dense == 0:
            dense = dense.new_zeros((len(dense), 1))
        logits: torch.Tensor = self.dlrm(dense, batch.sparse_features)
        return logits.squeeze(1)


class GMFClicks(nn.Module):
    """Generalised matrix factorisation (He et al. 2017): a weighted inner product of a user and an item embedding."""

    def __init__(self, collection: CCEEmbeddingBagCollection, dim: int) -> None:
        super().__init__()
        self.collection = collection
        self.output = nn.Linear(dim, 1)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits `[B]`."""
        embeddings: KeyedTensor = self.collection(batch.sparse_features)
        user, item = (embeddings[key] for key in embeddings.keys())  # noqa: SIM118  a KeyedTensor is no mapping
        return self.output(user * item).squeeze(1)  # type: ignore[no-any-return]


def build_model(config: RunConfig, *, num_dense: int, device: torch.device) -> nn.Module:
    """The model that `config` describes, its weights drawn from `config.seed`."""
    torch.manual_seed(config.seed)
    collection = CCEEmbeddingBagCollection(tables=config.table_configs(), device=device)
    if config.model.name == "gmf":
        return GMFClicks(collection, config.embedding.dim).to(device)
    return DLRMClicks(collection, num_dense, config).to(device)
