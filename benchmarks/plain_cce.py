"""A plain implementation of the paper's method in a few lines of PyTorch and FAISS, to compare the package with.

A GMF multiplies the embeddings of a user and of an item. Every table has `c` columns of a codebook and a helper, is
indexed by tensors of random numbers, and is clustered as Algorithm 3 says. It shares nothing with the package but the
files that both read and the measure of quality.
"""

from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from torch import nn

from torchrec_cce.training.metrics import Quality, quality


class PlainCCE(nn.Module):
    """`concat_j(M_j[h_j(id)] + M'_j[h'_j(id)])`."""

    pointers: torch.Tensor
    """[2, c, n] int64."""

    def __init__(self, num_ids: int, dim: int, *, num_rows: int, num_columns: int) -> None:
        super().__init__()
        self.num_rows = num_rows
        bound = dim**-0.5
        self.codewords = nn.Parameter(torch.empty(2, num_columns, num_rows, dim // num_columns).uniform_(-bound, bound))
        self.register_buffer("pointers", torch.randint(num_rows, (2, num_columns, num_ids)))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`[N, d]`."""
        columns = torch.arange(self.codewords.shape[1])[:, None]
        both = [self.codewords[p][columns, self.pointers[p][:, ids]] for p in range(2)]  # each [c, N, d/c]
        return (both[0] + both[1]).transpose(0, 1).flatten(1)

    @torch.no_grad()
    def cluster(self, seed: int) -> None:
        """Learn new pointers and centroids, draw a new hash, and set the helper to zero."""
        _, num_columns, num_ids = self.pointers.shape
        everyone = self(torch.arange(num_ids)).view(num_ids, num_columns, -1)
        for j in range(num_columns):
            points = everyone[:, j].contiguous().numpy()
            kmeans = faiss.Kmeans(
                points.shape[1],
                self.num_rows,
                niter=50,
                max_points_per_centroid=256,
                seed=seed * 100 + j,
                verbose=False,
            )
            kmeans.train(points)
            self.codewords[0, j] = torch.from_numpy(kmeans.centroids)
            self.pointers[0, j] = torch.from_numpy(kmeans.index.search(points, 1)[1][:, 0])
        self.codewords[1].zero_()
        self.pointers[1] = torch.randint(self.num_rows, (num_columns, num_ids))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a run, which are those of the runs that it is compared with."""

    dim: int
    num_rows: int
    num_columns: int
    learning_rate: float
    weight_decay: float
    dense_learning_rate: float
    batch_size: int
    epochs: int
    clusterings: int
    """The number of clusterings, one after each of the first epochs."""
    seed: int


def train_plain(data: Path, sizes: dict[str, int], settings: Settings) -> tuple[Quality, Quality]:
    """Train on `train.parquet`.

    Returns:
        The quality on `validation.parquet` and `test.parquet` after the epoch that is best on the first.
    """
    torch.manual_seed(settings.seed)
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    splits = {split: _read(data / f"{split}.parquet") for split in ("train", "validation", "test")}
    tables = nn.ModuleList(
        [
            PlainCCE(sizes[name], settings.dim, num_rows=settings.num_rows, num_columns=settings.num_columns)
            for name in ("user", "item")
        ]
    )
    output = nn.Linear(settings.dim, 1)
    optimizers = [
        torch.optim.AdamW(tables.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay),
        torch.optim.AdamW(output.parameters(), lr=settings.dense_learning_rate),
    ]

    def logits(ids: torch.Tensor) -> torch.Tensor:
        user, item = (table(column) for table, column in zip(tables, ids, strict=True))
        scores: torch.Tensor = output(user * item).squeeze(1)
        return scores

    best: tuple[Quality, Quality] | None = None
    ids, labels = splits["train"]
    for epoch in range(settings.epochs):
        for start in range(0, len(labels), settings.batch_size):
            batch = slice(start, start + settings.batch_size)
            loss = nn.functional.binary_cross_entropy_with_logits(logits(ids[:, batch]), labels[batch])
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
        with torch.no_grad():
            found = [quality(logits(splits[split][0]), splits[split][1]) for split in ("validation", "test")]
        if best is None or found[0].bce < best[0].bce:
            best = found[0], found[1]
        if epoch < settings.clusterings:
            for number, table in enumerate(tables):
                assert isinstance(table, PlainCCE)
                table.cluster(seed=(settings.seed * settings.epochs + epoch) * 2 + number)
    assert best is not None
    return best


def _read(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """IDs `[2, N] int64` of users and items, and labels `[N] float32`."""
    table = pq.read_table(path, columns=["user", "item", "label"])
    ids: npt.NDArray[np.int64] = np.stack([table[name].to_numpy().astype(np.int64) for name in ("user", "item")])
    return torch.from_numpy(ids), torch.from_numpy(table["label"].to_numpy().astype(np.float32))
