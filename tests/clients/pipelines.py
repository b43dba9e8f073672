"""A train pipeline of TorchRec's in the place of a plain loop, drained for a clustering in the middle.

torchrun --nproc_per_node 1 -m tests.clients.pipelines TrainPipelineSparseDist
"""

import sys
from contextlib import suppress

import torch
import torch.distributed as dist
from torchrec.distributed.train_pipeline import train_pipelines

from tests.clients.clicks import batches
from tests.clients.sharded import build
from torchrec_cce.sharding import drain, recluster_sharded


def main(kind: str) -> None:
    dist.init_process_group("gloo")
    model, optimizer = build()
    options = {"pipeline_postproc": True} if "SparseDist" in kind else {}
    pipeline = getattr(train_pipelines, kind)(model, optimizer, torch.device("cpu"), **options)
    stream = batches()
    outputs = [pipeline.progress(stream) for _ in range(15)]
    in_flight = drain(pipeline)
    outputs += in_flight
    clustered_after = len(outputs)
    recluster_sharded(model, optimizer, seed=1)
    with suppress(StopIteration):
        while True:
            outputs.append(pipeline.progress(stream))

    assert len(in_flight) == (2 if kind == "TrainPipelineSparseDist" else 1)
    model, optimizer = build()
    for number, (batch, (loss, *_)) in enumerate(zip(batches(), outputs, strict=True)):
        if number == clustered_after:
            recluster_sharded(model, optimizer, seed=1)
        optimizer.zero_grad()
        expected, _ = model(batch)
        expected.backward()
        optimizer.step()
        assert abs(loss.item() - expected.item()) < 1e-6, (number, loss, expected)
    losses = [loss.item() for loss, *_ in outputs]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), losses
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
