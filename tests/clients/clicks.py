"""The log, the tables and the model of the scripts in this folder."""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM, DLRMTrain

from torchrec_cce import CCEEmbeddingBagCollection

NUM_USERS, NUM_ITEMS, BATCH_SIZE, MAX_ITEMS = 200, 100, 64, 3
Sample = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
TABLES = [
    EmbeddingBagConfig(name="t_user", num_embeddings=NUM_USERS, embedding_dim=16, feature_names=["user"]),
    EmbeddingBagConfig(name="t_item", num_embeddings=NUM_ITEMS, embedding_dim=16, feature_names=["items"]),
]


class Clicks(Dataset[Sample]):
    """Dense features, a user, up to three items, and a click, which the user's group decides; int32 IDs."""

    def __init__(self, rows: int = 30 * BATCH_SIZE) -> None:
        random = torch.Generator().manual_seed(0)
        self.dense = torch.rand(rows, 4, generator=random)
        self.users = torch.randint(NUM_USERS, (rows,), generator=random, dtype=torch.int32)
        self.items = torch.randint(NUM_ITEMS, (rows, MAX_ITEMS), generator=random, dtype=torch.int32)
        self.lengths = torch.randint(MAX_ITEMS + 1, (rows,), generator=random, dtype=torch.int32)
        self.labels = (self.users % 2).float()

    def __len__(self) -> int:
        return len(self.dense)

    def __getitem__(self, row: int) -> Sample:
        return self.dense[row], self.users[row], self.items[row, : self.lengths[row]], self.labels[row]


def collate(samples: list[Sample]) -> Batch:
    dense, users, items, labels = zip(*samples, strict=True)
    sparse = KeyedJaggedTensor(
        keys=["user", "items"],
        values=torch.cat([torch.stack(users), *items]),
        lengths=torch.tensor([1] * len(users) + [len(each) for each in items], dtype=torch.int32),
    )
    return Batch(torch.stack(dense), sparse, torch.stack(labels))


def batches() -> Iterator[Batch]:
    return iter(DataLoader(Clicks(), batch_size=BATCH_SIZE, collate_fn=collate))


def dlrm(ebc: EmbeddingBagCollection | CCEEmbeddingBagCollection) -> DLRMTrain:
    torch.manual_seed(0)
    return DLRMTrain(DLRM(ebc, dense_in_features=4, dense_arch_layer_sizes=[16, 16], over_arch_layer_sizes=[16, 1]))
