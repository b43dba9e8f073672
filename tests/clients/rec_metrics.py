"""TorchRec's metrics over a training: with full tables, the same as of the stock collection."""

import torch
from torchrec import EmbeddingBagCollection
from torchrec.metrics.metric_module import RecMetricModule, generate_metric_module
from torchrec.metrics.metrics_config import DefaultTaskInfo, MetricsConfig, RecMetricDef, RecMetricEnum

from tests.clients.clicks import BATCH_SIZE, TABLES, batches, dlrm
from torchrec_cce import CCEEmbeddingBagCollection, tables_under_cap

WINDOW = RecMetricDef(rec_tasks=[DefaultTaskInfo], window_size=10 * BATCH_SIZE)
CONFIG = MetricsConfig(rec_tasks=[DefaultTaskInfo], rec_metrics={RecMetricEnum.NE: WINDOW, RecMetricEnum.AUC: WINDOW})


def train(ebc: EmbeddingBagCollection | CCEEmbeddingBagCollection) -> dict[str, float]:
    """The metrics over the last ten batches."""
    metrics = generate_metric_module(
        RecMetricModule,
        metrics_config=CONFIG,
        batch_size=BATCH_SIZE,
        world_size=1,
        my_rank=0,
        state_metrics_mapping={},
        device=torch.device("cpu"),
    )
    model = dlrm(ebc)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    for epoch in range(3):
        for batch in batches():
            optimizer.zero_grad()
            loss, (_, logits, labels) = model(batch)
            loss.backward()
            optimizer.step()
            metrics.update({"prediction": logits.sigmoid(), "label": labels, "weight": torch.ones_like(labels)})
        if isinstance(ebc, CCEEmbeddingBagCollection) and epoch < 2:
            ebc.recluster(seed=epoch, optimizer=optimizer)
    return {name: float(value) for name, value in metrics.compute().items() if "window" in name}


def main() -> None:
    stock, full = EmbeddingBagCollection(tables=TABLES), CCEEmbeddingBagCollection(tables=TABLES)
    full.load_state_dict(stock.state_dict())
    expected, found = train(stock), train(full)
    assert found.keys() == expected.keys()
    assert all(abs(found[name] - expected[name]) < 1e-5 for name in expected), (found, expected)
    compressed = train(CCEEmbeddingBagCollection(tables=tables_under_cap(TABLES, method="cce", max_parameters=1_000)))
    assert compressed["ne-DefaultTask|window_ne"] < 0.9
    assert compressed["auc-DefaultTask|window_auc"] > 0.7


if __name__ == "__main__":
    main()
