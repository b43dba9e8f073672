"""The average of a model's weights (an EMA), begun anew after each clustering, and what it says of a log."""

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchrec import EmbeddingBagCollection

from tests.clients.clicks import TABLES, batches, dlrm
from torchrec_cce import CCEEmbeddingBagCollection, tables_under_cap


@torch.no_grad()
def evaluate(model: torch.nn.Module) -> float:
    losses = [model(batch)[0] for batch in batches()]
    return float(torch.stack(losses).mean())


def train(ebc: EmbeddingBagCollection | CCEEmbeddingBagCollection) -> list[float]:
    """Losses of the average after each epoch, and of the model after the last."""
    model = dlrm(ebc)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    found = []
    for epoch in range(2):
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        for batch in batches():
            optimizer.zero_grad()
            loss, _ = model(batch)
            loss.backward()
            optimizer.step()
            average.update_parameters(model)
        found.append(evaluate(average))
        if isinstance(ebc, CCEEmbeddingBagCollection) and epoch == 0:
            ebc.recluster(seed=epoch, optimizer=optimizer)
    return [*found, evaluate(model)]


def main() -> None:
    torch.manual_seed(0)
    stock = EmbeddingBagCollection(tables=TABLES)
    full = CCEEmbeddingBagCollection(tables=TABLES)
    full.load_state_dict(stock.state_dict())
    expected = train(stock)
    assert torch.allclose(torch.tensor(train(full)), torch.tensor(expected), rtol=0, atol=1e-6)
    first, second, last = train(
        CCEEmbeddingBagCollection(tables=tables_under_cap(TABLES, method="cce", max_parameters=1_000))
    )
    assert second < first
    assert second != last


if __name__ == "__main__":
    main()
