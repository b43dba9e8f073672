"""Reclustering on one rank and on two: wall time, CPU time, and memory beyond what is shared."""

import os
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.figure import report
from benchmarks.processes import Peak
from tests.support.launch import on_ranks
from tests.support.sharded_models import split_by_rows
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.methods.cce import CCEEmbeddingBagConfig
from torchrec_cce.modules.embedding_bag import CCEEmbeddingBagCollection
from torchrec_cce.sharding.recluster import recluster_sharded
from torchrec_cce.training.config import OptimizerConfig
from torchrec_cce.training.parallel import process_group, shard

NUM_TABLES, NUM_IDS, NUM_ROWS, DIM = 4, 10_000_000, 1024, 16
FEW_IDS = 2_000_000
SETTINGS = ReclusterConfig(num_threads=1, points_per_centroid=64, num_iterations=20)


def recluster_once(folder: str, num_ids: int) -> tuple[float, float, int, str]:
    """(wall seconds, CPU seconds of this rank, bytes of private memory at the peak, digest of the first map)."""
    os.environ["TORCHREC_CCE_CACHE"] = folder
    os.environ["LOCAL_WORLD_SIZE"] = "1"  # one thread each, however many ranks
    torch.manual_seed(0)
    with process_group() as ranks:
        tables = [
            CCEEmbeddingBagConfig(
                name=f"t{i}", num_embeddings=num_ids, embedding_dim=DIM, feature_names=[f"f{i}"], num_rows=NUM_ROWS
            )
            for i in range(NUM_TABLES)
        ]
        collection = CCEEmbeddingBagCollection(tables=tables)
        module = torch.nn.ModuleDict({"sparse": collection, "dense": torch.nn.Linear(1, 1)})
        config = OptimizerConfig(embedding="sgd")
        plan = split_by_rows(module, config, world_size=ranks.world_size)
        model, optimizer = shard(module, plan, config, ranks)
        wall, cpu = time.perf_counter(), time.process_time()
        with Peak("RssAnon") as memory:
            recluster_sharded(model, optimizer, seed=0, settings=SETTINGS)
        seconds = time.perf_counter() - wall, time.process_time() - cpu
        (found,) = [m for m in model.module.modules() if isinstance(m, CCEEmbeddingBagCollection)]
        return *seconds, memory.grown, found.pointer_map("t0").digest


def recluster_figures() -> None:
    what = f"{NUM_TABLES} tables × {NUM_IDS:,} IDs, k = {NUM_ROWS}, 4 columns, d = {DIM}, one thread a rank"
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, world_size, num_ids in (("1", 1, NUM_IDS), ("2", 2, NUM_IDS), ("few", 2, FEW_IDS)):
            finished = on_ranks(Path(folder) / name, world_size, recluster_once, folder, num_ids)
            assert all(rank.code == 0 for rank in finished), finished[0].stderr
            results[name] = [rank.value for rank in finished]
    few = results.pop("few")
    digests = {digest for ranks in results.values() for *_, digest in ranks}
    report(
        "recluster, different maps made by 1 and 2 ranks",
        len(digests) - 1,
        target="0",
        holds=len(digests) == 1,
        against=what,
    )
    walls, cpus = ([max(rank[i] for rank in results[n]) for n in ("1", "2")] for i in (0, 1))
    report("recluster, seconds on 1 rank", walls[0], against=what)
    report(
        "recluster, times as fast on 2 ranks",
        walls[0] / walls[1],
        target="≥ 1.6",
        holds=walls[0] / walls[1] >= 1.6,
        against=f"1 rank; {what}",
    )
    report(
        "recluster, CPU seconds of a rank, share on 2 ranks",
        cpus[1] / cpus[0],
        target="≤ 0.625",
        holds=cpus[1] / cpus[0] <= 0.625,
        against=f"1 rank's {cpus[0]:.1f} s; {what}",
    )
    grown, grown_few = (max(rank[2] for rank in ranks) for ranks in (results["2"], few))
    per_id = (grown - grown_few) / (NUM_TABLES * (NUM_IDS - FEW_IDS))
    report(
        "recluster, private memory of a rank at its peak, bytes for each more ID",
        per_id,
        target="≤ 4, a half of the 8 that its pointers take",
        holds=per_id <= 4,
        against=f"{grown / 1e6:.0f} MB, and {grown_few / 1e6:.0f} MB with {FEW_IDS:,} IDs a table; {what}",
    )


if __name__ == "__main__":
    recluster_figures()
