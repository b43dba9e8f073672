"""A data loader with workers, which also remap, over a map-style data set of int32 IDs; a clustering between epochs."""

import torch
from torch.utils.data import DataLoader

from tests.clients.clicks import BATCH_SIZE, TABLES, Clicks, collate, dlrm
from torchrec_cce import CCEEmbeddingBagCollection, tables_under_cap
from torchrec_cce.sharding import RowCollate


def train(num_workers: int, *, remap_in_workers: bool) -> list[float]:
    """Mean losses of the epochs."""
    torch.manual_seed(0)
    ebc = CCEEmbeddingBagCollection(tables=tables_under_cap(TABLES, method="cce", max_parameters=1_000))
    model = dlrm(ebc)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    rows = RowCollate(ebc, collate)
    loader = DataLoader(
        Clicks(),
        batch_size=BATCH_SIZE,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
        multiprocessing_context="fork" if num_workers else None,  # the default of Linux
        collate_fn=rows if remap_in_workers else collate,
    )
    means = []
    for epoch in range(3):
        torch.manual_seed(epoch)
        losses = []
        for batch in rows.batches(loader) if remap_in_workers else loader:
            optimizer.zero_grad()
            loss, _ = model(batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        means.append(float(torch.stack(losses).mean()))
        ebc.recluster(seed=epoch, optimizer=optimizer)
    return means


def main() -> None:
    plain = train(0, remap_in_workers=False)
    assert plain[-1] < plain[0]
    assert train(2, remap_in_workers=False) == plain
    remapped = train(2, remap_in_workers=True)
    assert max(abs(a - b) for a, b in zip(plain, remapped, strict=True)) < 1e-6, (plain, remapped)


if __name__ == "__main__":
    main()
