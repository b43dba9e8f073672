"""`torch.compile` of a whole model, which reads raw IDs: the remap breaks the graph, and the rest is compiled."""

import sys

import torch

from tests.clients.clicks import TABLES, batches, dlrm
from torchrec_cce import CCEEmbeddingBagCollection, tables_under_cap


def train(backend: str | None) -> list[float]:
    torch.manual_seed(0)
    ebc = CCEEmbeddingBagCollection(tables=tables_under_cap(TABLES, method="cce", max_parameters=1_000))
    model = dlrm(ebc)
    step = model if backend is None else torch.compile(model, backend=backend)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    losses = []
    for number, batch in enumerate(batches()):
        optimizer.zero_grad()
        loss, _ = step(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if number == 15:
            ebc.recluster(seed=1, optimizer=optimizer)
    return losses


def main(backend: str) -> None:
    eager, compiled = train(None), train(backend)
    assert max(abs(a - b) for a, b in zip(eager, compiled, strict=True)) < 1e-5, (eager, compiled)
    assert sum(compiled[-5:]) < sum(compiled[:5]), compiled


if __name__ == "__main__":
    main(*sys.argv[1:])
