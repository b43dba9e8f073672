"""TorchRec's DLRM on raw IDs of a large universe: a stock script in which a few lines have changed."""

import torch
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM, DLRMTrain

from torchrec_cce import CCEEmbeddingBagCollection, tables_under_cap

NUM_USERS, NUM_ITEMS, BATCH_SIZE = 20_000, 5_000, 1024


def random_batch() -> Batch:
    """Whether a user clicks depends on the user's and the item's group, which nobody tells the model."""
    users, items = torch.randint(0, NUM_USERS, (BATCH_SIZE,)), torch.randint(0, NUM_ITEMS, (BATCH_SIZE,))
    sparse = KeyedJaggedTensor(
        keys=["user", "item"],
        values=torch.cat([users, items]),
        lengths=torch.ones(2 * BATCH_SIZE, dtype=torch.int32),
    )
    return Batch(torch.rand(BATCH_SIZE, 4), sparse, ((users % 8) > (items % 8)).float())


def main() -> None:
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(name="t_user", num_embeddings=NUM_USERS, embedding_dim=16, feature_names=["user"]),
        EmbeddingBagConfig(name="t_item", num_embeddings=NUM_ITEMS, embedding_dim=16, feature_names=["item"]),
    ]
    ebc = CCEEmbeddingBagCollection(tables=tables_under_cap(tables, method="cce", max_parameters=8_000))
    dlrm = DLRM(ebc, dense_in_features=4, dense_arch_layer_sizes=[32, 16], over_arch_layer_sizes=[32, 1])
    model = DLRMTrain(dlrm)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
    for step in range(60):
        optimizer.zero_grad()
        loss, _ = model(random_batch())
        loss.backward()
        optimizer.step()
        if step in (20, 40):
            ebc.recluster(seed=step, optimizer=optimizer)
    print(f"{sum(p.numel() for p in ebc.parameters()):,} trained parameters in tables, loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
