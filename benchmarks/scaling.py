"""Modelled, not measured: what TorchRec's planner expects of DLRM on Criteo's Terabyte log, on 8 to 1024 GPUs.

`python -m benchmarks.scaling` prints the table of docs/scaling.md.
"""

import torch
from rich.filesize import decimal
from torchrec import EmbeddingBagConfig
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from benchmarks.figure import report
from torchrec_cce import CCEEmbeddingBagCollection
from torchrec_cce.errors import ConfigError
from torchrec_cce.methods.registry import Method, tables_under_cap
from torchrec_cce.sharding.estimates import PlanSummary
from torchrec_cce.sharding.planner import CCEShardingPlanner, planning_topology
from torchrec_cce.sharding.sharders import get_cce_sharders

UNIVERSES = (
    *(40_000_000, 39_060, 17_295, 7_424, 20_265, 3, 7_122, 1_543, 63, 40_000_000, 3_067_956, 405_282, 10),
    *(2_209, 11_938, 155, 4, 976, 14, 40_000_000, 40_000_000, 40_000_000, 590_152, 12_973, 108, 36),
)
"""IDs of the 26 features, as MLPerf's DLRM takes them."""
DIM = 128
MAX_PARAMETERS = 2 * 1000 * DIM
BATCH = 2048
WORLD_SIZES = (8, 64, 256, 1024)
COMPARED: tuple[Method, ...] = ("full", "hashing_trick", "cce")


def plan(method: Method, world_size: int) -> PlanSummary:
    full = [
        EmbeddingBagConfig(name=f"t{i}", num_embeddings=n, embedding_dim=DIM, feature_names=[f"f{i}"])
        for i, n in enumerate(UNIVERSES)
    ]
    tables = tables_under_cap(full, method=method, max_parameters=MAX_PARAMETERS)
    collection = CCEEmbeddingBagCollection(tables, device=torch.device("meta"))
    apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), {"lr": 0.01})
    topology = planning_topology(
        "cuda", world_size=world_size, local_world_size=8, device_bytes=80 << 30, host_bytes=1 << 40
    )
    planner = CCEShardingPlanner(topology=topology, batch_size=BATCH)
    planner.plan(collection, get_cce_sharders())
    return planner.summary


def scaling_figures() -> None:
    """The ends of the table, as figures."""
    against = f"modelled, not measured: Criteo Terabyte, d = {DIM}, {BATCH} rows a rank, hosts of 8 GPUs"
    for world_size in (8, 64):
        full, cce = plan("full", world_size), plan("cce", world_size)
        report(
            f"embedding step on {world_size} GPUs, full tables over CCE",
            full.milliseconds / cce.milliseconds,
            against=against,
        )


def main() -> None:
    print("| GPUs | method | replicated, placed, split | device | host | all-to-all | all-reduce | ms |")
    print("|---|---|---|---|---|---|---|---|")
    for world_size in WORLD_SIZES:
        for method in COMPARED:
            try:
                summary = plan(method, world_size)
            except ConfigError as error:
                print(f"| {world_size} | {method} | {error} | | | | | |")
                continue
            kinds = [table.sharding_type for table in summary.tables]
            counts = [kinds.count("data_parallel"), kinds.count("table_wise")]
            sizes = (summary.device_bytes, summary.host_bytes, summary.all_to_all_bytes, summary.all_reduce_bytes)
            cells = [str(world_size), method, f"{counts[0]}, {counts[1]}, {len(kinds) - sum(counts)}"]
            cells += [*(decimal(size) if size else "–" for size in sizes), f"{summary.milliseconds:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
