"""A whole model, compiled without a break: by `torch.compile` around it, or by `TrainPipelinePT2`."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torchrec.datasets.utils import Batch
from torchrec.distributed.train_pipeline.train_pipelines import TorchCompileConfig, TrainPipelinePT2

from tests.clients.clicks import TABLES, batches, dlrm
from torchrec_cce import CCEEmbeddingBagCollection, tables_under_cap
from torchrec_cce.sharding import drain

Progress = Callable[[Iterator[Batch]], Any]


def loop(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    def progress(stream: Iterator[Batch]) -> Any:
        optimizer.zero_grad()
        loss, output = model(next(stream))
        loss.backward()
        optimizer.step()
        return loss, output

    return progress


def pipeline(model: torch.nn.Module, optimizer: torch.optim.Optimizer, backend: str) -> TrainPipelinePT2[Any, Any]:
    configs = TorchCompileConfig(fullgraph=True, dynamic=None, backend=backend)
    return TrainPipelinePT2(model, optimizer, torch.device("cpu"), compile_configs=configs)


def train(kind: str, backend: str) -> list[float]:
    torch.manual_seed(0)
    ebc = CCEEmbeddingBagCollection(tables=tables_under_cap(TABLES, method="cce", max_parameters=1_000))
    model = dlrm(ebc)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    compiled = torch.compile(model, backend=backend, fullgraph=True) if kind == "torch.compile" else model
    pipelined = pipeline(model, optimizer, backend) if kind == "TrainPipelinePT2" else None
    progress = loop(compiled, optimizer) if pipelined is None else pipelined.progress
    losses, stream = [], batches()
    for number in range(len(list(batches()))):
        losses.append(progress(stream)[0].item())
        if number == 15:
            if pipelined is not None:
                assert drain(pipelined) == []  # it reads no batch ahead
            ebc.recluster(seed=1, optimizer=optimizer)
    return losses


def main(kind: str, backend: str) -> None:
    eager, compiled = train("eager", backend), train(kind, backend)
    assert max(abs(a - b) for a, b in zip(eager, compiled, strict=True)) < 1e-5, (eager, compiled)
    assert sum(compiled[-5:]) < sum(compiled[:5]), compiled


if __name__ == "__main__":
    main(*sys.argv[1:])
