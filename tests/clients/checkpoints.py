"""Trained in shards and saved by `torch.distributed.checkpoint`; resumed in shards, and served without any."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from tests.clients.clicks import TABLES, batches, dlrm
from tests.clients.sharded import build
from torchrec_cce import CCEEmbeddingBagCollection, Registry, load_model, save_model, tables_under_cap
from torchrec_cce.sharding import ShardedMaps, load_checkpoint, recluster_sharded


@torch.no_grad()
def scores(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([model(batch)[1][1] for batch in batches()])


def main(run_dir: Path) -> None:
    dist.init_process_group("gloo")
    registry = Registry(run_dir / "maps")
    model, optimizer = build()
    for number, batch in enumerate(batches()):
        optimizer.zero_grad()
        model(batch)[0].backward()
        optimizer.step()
        if number == 15:
            registry.publish(ShardedMaps(model).snapshot(recluster_sharded(model, optimizer, seed=1)))
            registry.open().attach(ShardedMaps(model))
    dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=run_dir / "first")

    resumed, its_optimizer = build()
    registry.open().attach(ShardedMaps(resumed))
    load_checkpoint(run_dir / "first", resumed, its_optimizer)
    assert torch.equal(scores(resumed), scores(model))
    for each, descent in ((model, optimizer), (resumed, its_optimizer)):
        descent.zero_grad()
        each(next(batches()))[0].backward()
        descent.step()
    assert torch.equal(scores(resumed), scores(model))

    tables = tables_under_cap(TABLES, method="cce", max_parameters=1_000)
    served, copied = (dlrm(CCEEmbeddingBagCollection(tables=tables)) for _ in range(2))
    registry.open().attach(served.model.sparse_arch.embedding_bag_collection)
    weights = served.state_dict()
    dcp.save({"model": model.state_dict()}, checkpoint_id=run_dir / "last")
    dcp.load({"model": weights}, checkpoint_id=run_dir / "last")
    served.load_state_dict(weights)
    assert torch.allclose(scores(served), scores(model), rtol=0, atol=1e-6)
    save_model(served, run_dir / "served")
    load_model(copied, run_dir / "served")
    assert torch.equal(scores(copied), scores(served))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
