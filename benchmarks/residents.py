"""Residents: a step beside one of CCE, a fold beside a clustering of the same table, and what others read of a run."""

import json
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torchrec import KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from benchmarks.figure import race, report
from benchmarks.logs import DATA, LOGS
from torchrec_cce import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig, ResidentConfig
from torchrec_cce.clustering.executor import Clustering, InProcess
from torchrec_cce.clustering.fold import ResidentRows, TableFold
from torchrec_cce.clustering.recluster import recluster_tables
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.clustering.table import TableClustering
from torchrec_cce.hashing import term_hash
from torchrec_cce.kernels.slots import NEVER
from torchrec_cce.maps.residency import Residency
from torchrec_cce.sharding.admit import admit_sharded
from torchrec_cce.sharding.planner import CCEShardingPlanner
from torchrec_cce.sharding.sharders import get_cce_sharders
from torchrec_cce.training.config import parse_config
from torchrec_cce.training.loop import train
from torchrec_cce.training.metrics import quality
from torchrec_cce.training.parallel import process_group

DIM, COLUMNS, ROWS = 32, 8, 256
TABLES, STEP_IDS, BATCH = 2, 10**6, 4096
FOLD_IDS = (10**6, 10**7, 10**8)
FRACTION = 0.1
FOLDER = Path("runs/bench-residents")


def step_figures() -> None:
    """Remap, lookup, backward and update of one process, tables fused."""
    rng = np.random.default_rng(0)
    drawn = (STEP_IDS * rng.random(TABLES * BATCH) ** 3).astype(np.int64)  # a quarter of the IDs has 63 % of the draws
    features = KeyedJaggedTensor(
        keys=[f"f{i}" for i in range(TABLES)],
        values=torch.from_numpy(drawn),
        lengths=torch.ones(TABLES * BATCH, dtype=torch.int32),
    )
    frequencies = {f"t{i}": np.arange(STEP_IDS, 0, -1) for i in range(TABLES)}
    kinds = {
        "CCE": None,
        "float32 residents": ResidentConfig(fraction=0.25),
        "int8 residents": ResidentConfig(fraction=0.25, dtype="int8"),
    }
    with process_group() as ranks:
        models = {}
        for name, residents in kinds.items():
            collection = CCEEmbeddingBagCollection(
                [
                    CCEEmbeddingBagConfig(
                        name=f"t{i}",
                        num_embeddings=STEP_IDS,
                        embedding_dim=DIM,
                        feature_names=[f"f{i}"],
                        num_columns=COLUMNS,
                        num_rows=ROWS,
                        residents=residents,
                    )
                    for i in range(TABLES)
                ]
            )
            collection.recluster(seed=0, settings=ReclusterConfig(num_iterations=2))  # pointers to look up
            apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), {"lr": 0.01})
            plan = CCEShardingPlanner(batch_size=BATCH).collective_plan(collection)
            models[name] = DistributedModelParallel(
                collection, device=ranks.device, plan=plan, sharders=get_cce_sharders()
            )
            if residents is not None:
                admit_sharded(models[name], models[name].fused_optimizer, seed=0, frequencies=frequencies)

        def step(model: DistributedModelParallel) -> None:
            model(features).values().square().mean().backward()

        seconds = race({name: partial(step, model) for name, model in models.items()}, rounds=31)
    sizes = f"{TABLES} tables, d = {DIM}, {COLUMNS} columns, k = {ROWS}, {BATCH} rows, no dense layers"
    against = f"{1000 * seconds['CCE']:.2f} ms of CCE; {sizes}"
    for name in list(kinds)[1:]:
        share = seconds[name] / seconds["CCE"]
        report(f"step with {name} over a step of CCE", share, target="≤ 1.15", holds=share <= 1.15, against=against)


def fold_figures() -> None:
    """CPU seconds of folds and clusterings of one table, in one thread."""
    folds = {}
    for num_ids in FOLD_IDS:
        seconds = {}
        for name, table in (("fold", _fold(num_ids)), ("clustering", _clustering(num_ids))):
            started = time.process_time()
            recluster_tables(InProcess({"t": table}))
            seconds[name] = time.process_time() - started
        folds[num_ids] = seconds["fold"]
        share = seconds["fold"] / seconds["clustering"]
        report(
            f"fold of {num_ids:,} IDs over a clustering, CPU time",
            share,
            target="≤ 1",
            holds=share <= 1,
            against=f"{seconds['clustering']:.1f} s; f = {FRACTION}, k = {ROWS}, {COLUMNS} columns, d = {DIM}",
        )
    *_, smaller, largest = FOLD_IDS
    growth = folds[largest] / folds[smaller]
    report(
        f"fold of {largest:,} IDs, times as long",
        growth,
        target="≤ 11",
        holds=growth <= 11,
        against=f"{folds[smaller]:.1f} s for {smaller:,} IDs",
    )


def _settings() -> ReclusterConfig:
    return ReclusterConfig(num_threads=1)


def _pointers(num_ids: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(1).integers(0, ROWS, (num_ids, COLUMNS), np.uint8)


def _codebook() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    shape = (COLUMNS, ROWS, DIM // COLUMNS)
    return np.random.default_rng(2).standard_normal(shape, np.float32)


def _fold(num_ids: int) -> Clustering:
    pointers, rng = _pointers(num_ids), np.random.default_rng(3)
    ages = np.where(rng.random(num_ids, np.float32) < FRACTION, 0, 1).astype(np.uint8)
    ages[::NEVER] = NEVER
    residency = Residency.nobody(num_ids).next_phase(ages)
    rows = 0.3 * rng.standard_normal((residency.slots.num_slots, DIM), np.float32)
    importances = np.float32(1) - rng.random(len(rows), np.float32)  # above 0
    return TableFold(
        codebook=_codebook(),
        codes=lambda positions: pointers[positions],
        residents=ResidentRows(residency=residency, rows=rows, importances=importances),
        is_first=False,
        row_states={},
        pointer_dtype=np.dtype(np.uint8),
        seed=0,
        config=_settings(),
    )


def _clustering(num_ids: int) -> Clustering:
    pointers, hashed = _pointers(num_ids), term_hash(0, 1, num_columns=COLUMNS, num_rows=ROWS)
    return TableClustering(
        weights=np.stack([_codebook(), 0.3 * _codebook()], axis=1),
        num_ids=num_ids,
        old_codes=lambda ids: np.stack([pointers[ids].T.astype(np.int64), hashed.numpy(ids).T], axis=1),
        new_helper_codes=lambda ids: hashed.numpy(ids).T,
        pointer_dtype=np.dtype(np.uint8),
        seed=0,
        config=_settings(),
    )


def reader_figures() -> None:
    """AUC of a run with residents, as it measures it, and from the files of its last version without the library."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    log = LOGS["globo_pairs"]
    if not log.is_there:
        print(f"the reader is skipped: {DATA} does not name the folder that holds globo_pairs", file=sys.stderr)
        return
    sections = log.sections(FOLDER / "data")
    user, item = sections["tables"]
    num_batches = 2 * 831
    config = parse_config(
        {
            **sections,
            "embedding": {"dim": DIM, "method": "cce_residents", "num_columns": COLUMNS, "max_parameters": ROWS * DIM},
            "model": {"name": "gmf"},
            "residents": {"fraction": 0.25, "learning_rate": 0.1, "shrinkage": 0.0},
            "recluster": {"ct": 6, "cf": num_batches // 6, "num_iterations": 10},
            "training": {"batch_size": 4096, "epochs": 2},
            "registry": {"url": str(FOLDER / "registry")},
        }
    )
    result = train(config, FOLDER / "run", show_progress=False)
    assert result.best is not None
    assert result.steps == num_batches  # the last fold is the end
    test = pq.read_table(sections["data"]["test"]["path"])
    embeddings = {name: read_embeddings(FOLDER / "registry", name)[test[name].to_numpy()] for name in (user, item)}
    dcp_to_torch_save(result.checkpoint, FOLDER / "weights.pt")
    weights = torch.load(FOLDER / "weights.pt")["model"]
    scores = (embeddings[user] * embeddings[item]) @ weights["output.weight"][0].numpy() + weights["output.bias"].item()
    measured = quality(torch.from_numpy(scores), torch.from_numpy(test["label"].to_numpy().astype(np.float32)))
    difference = abs(measured.auc - result.best["test_auc"])
    report(
        "AUC from published codewords and pointers by numpy, less the run's own",
        difference,
        target="≤ 1e-6",
        holds=difference <= 1e-6,
        against=f"{result.best['test_auc']:.6f} of the run; {log.about}",
    )


def read_embeddings(registry: Path, table: str) -> npt.NDArray[np.float32]:
    """[n, d]: of all IDs of a table, from the files of the newest version; see docs/map-format.md."""
    newest = max((registry / "log").iterdir())
    entry = json.loads(newest.read_text())["content"]["versions"][-1]
    folder = registry / entry["folder"]
    described = json.loads((folder / "manifest.json").read_text())["content"]["tables"]
    found = next(each for name, each in described.items() if name in (table, f"t_{table}"))

    def column(name: str) -> npt.NDArray[np.generic]:
        lists = pa.ipc.open_file(folder / found[name]["name"]).read_all().column(0).combine_chunks()
        values: npt.NDArray[np.generic] = lists.flatten().to_numpy().reshape(len(lists), -1)
        return values

    pointers, weights = column("pointers"), column("weights")
    codebooks = weights.reshape(found["num_columns"], 2, found["num_rows"], -1)[:, 0]
    return np.concatenate([codebook[codes] for codebook, codes in zip(codebooks, pointers.T, strict=True)], axis=1)


def main() -> None:
    torch.set_num_threads(1)
    reader_figures()
    step_figures()
    fold_figures()


if __name__ == "__main__":
    main()
