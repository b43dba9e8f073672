"""TorchRec's optimizers around one another: a warm-up of all rates, clipped gradients, an optimizer for each part.

Beside it, the same by PyTorch alone, with a scheduler for each rate.
"""

import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LinearLR
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage

from tests.clients.clicks import TABLES, batches, dlrm
from torchrec_cce import CCEEmbeddingBagCollection, tables_under_cap


def train(*, keyed: bool) -> list[float]:
    torch.manual_seed(0)
    ebc = CCEEmbeddingBagCollection(tables=tables_under_cap(TABLES, method="cce", max_parameters=1_000))
    model = dlrm(ebc)
    embeddings = {name: each for name, each in model.named_parameters() if "embedding_bags" in name}
    others = {name: each for name, each in model.named_parameters() if name not in embeddings}
    if keyed:
        tables = KeyedOptimizerWrapper(embeddings, lambda parameters: torch.optim.Adam(parameters))
        dense = KeyedOptimizerWrapper(others, lambda parameters: torch.optim.Adagrad(parameters))
        clipped = GradientClippingOptimizer(dense, clipping=GradientClipping.NORM, max_gradient=0.1)
        stages = [WarmupStage(policy=WarmupPolicy.LINEAR, max_iters=10, value=0.1)]
        optimizer = WarmupOptimizer(CombinedOptimizer([("tables", tables), ("dense", clipped)]), stages, lr=0.05)
    else:
        adam = torch.optim.Adam(embeddings.values(), lr=0.05)
        adagrad = torch.optim.Adagrad(others.values(), lr=0.05)
        schedulers = [LinearLR(each, start_factor=0.1, total_iters=10) for each in (adagrad, adam)]
    losses = []
    for number, batch in enumerate(batches()):
        model.zero_grad()
        loss, _ = model(batch)
        loss.backward()
        if keyed:
            optimizer.step()
        else:
            clip_grad_norm_(others.values(), 0.1)
            for each in (adagrad, adam, *schedulers):
                each.step()
        losses.append(loss.item())
        if number == 15:
            ebc.recluster(seed=1, optimizer=optimizer if keyed else adam)
    return losses


def main() -> None:
    keyed, plain = train(keyed=True), train(keyed=False)
    assert max(abs(a - b) for a, b in zip(keyed, plain, strict=True)) < 1e-6, (keyed, plain)
    assert sum(keyed[-5:]) < sum(keyed[:5]), keyed


if __name__ == "__main__":
    main()
