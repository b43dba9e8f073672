"""Rows a second of `train` on Parquet: with CCE tables against its own full tables, and against a plain script:
`python -m benchmarks.training`. One process, one thread of PyTorch, CPU time, interleaved, medians.

A run is timed twice, over some rows and over more: what is counted are the rows between, without start and end.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec import KeyedJaggedTensor
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from benchmarks.figure import report
from benchmarks.steps import NUM_DENSE, dlrm
from torchrec_cce import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from torchrec_cce.training.command import quiet_libraries
from torchrec_cce.training.config import OptimizerConfig, parse_config
from torchrec_cce.training.loop import train

SIZES = [10_000] * 8 + [100_000] * 12 + [500_000] * 6
DIM, NUM_COLUMNS, NUM_ROWS, BATCH = 16, 4, 1024, 2048
FEW, MANY = 10 * BATCH, 60 * BATCH
ROUNDS = 5
FOLDER = Path("runs/bench-training")
FEATURES = [f"f{i}" for i in range(len(SIZES))]
DENSE = [f"x{i}" for i in range(NUM_DENSE)]


def write_log(path: Path) -> None:
    """Labels, dense fields and Zipf's raw IDs."""
    rng = np.random.default_rng(0)
    columns = {"label": (rng.random(MANY) < 0.25).astype(np.float32)}
    columns |= {name: rng.random(MANY, np.float32) for name in DENSE}
    for name, n in zip(FEATURES, SIZES, strict=True):
        ranks = np.exp(rng.random(MANY) * np.log(n)).astype(np.int64) - 1
        columns[name] = np.clip(ranks, 0, n - 1) * 2_654_435_761 % n
    pq.write_table(pa.table(columns), path)


def by_train(log: Path, method: str, num_rows: int) -> None:
    shutil.rmtree(FOLDER / method, ignore_errors=True)
    embedding = {"dim": DIM, "method": method, "num_columns": NUM_COLUMNS}
    config = parse_config(
        {
            "data": {"format": "parquet", "train": {"path": str(log), "max_rows": num_rows}, "dense": DENSE},
            "tables": dict(zip(FEATURES, SIZES, strict=True)),
            # Every table is compressed: the smallest has 160,000 floats.
            "embedding": embedding if method == "full" else {**embedding, "max_parameters": 2 * NUM_ROWS * DIM},
            "training": {"batch_size": BATCH},
        }
    )
    train(config, FOLDER / method, show_progress=False)


def by_script(log: Path, num_rows: int) -> None:
    """What somebody writes who has read the README: our collection in TorchRec's DLRM, and no more."""
    collection = CCEEmbeddingBagCollection(
        [
            CCEEmbeddingBagConfig(
                name=f"t_{name}",
                num_embeddings=n,
                embedding_dim=DIM,
                feature_names=[name],
                num_columns=NUM_COLUMNS,
                num_rows=NUM_ROWS,
            )
            for name, n in zip(FEATURES, SIZES, strict=True)
        ]
    )
    model, config = dlrm(collection, DIM).train(), OptimizerConfig()
    tables = list(collection.parameters())
    of_tables = RowWiseAdagrad(tables, lr=config.embedding_learning_rate, eps=1e-8)
    rest = [parameter for parameter in model.parameters() if all(parameter is not table for table in tables)]
    of_rest = torch.optim.Adam(rest, lr=config.dense_learning_rate)
    left = num_rows
    for part in pq.ParquetFile(log).iter_batches(BATCH):
        dense = torch.from_numpy(np.stack([part.column(name).to_numpy() for name in DENSE], axis=1))
        ids = np.concatenate([part.column(name).to_numpy() for name in FEATURES])
        lengths = torch.ones(len(ids), dtype=torch.int32)
        features = KeyedJaggedTensor.from_lengths_sync(FEATURES, torch.from_numpy(ids), lengths)
        of_tables.zero_grad()
        of_rest.zero_grad()
        logits = model(dense, features).squeeze(1)
        binary_cross_entropy_with_logits(logits, torch.from_numpy(part.column("label").to_numpy().copy())).backward()
        of_tables.step()
        of_rest.step()
        left -= len(part)
        if left <= 0:
            return


def main() -> None:
    quiet_libraries()
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    log = FOLDER / "log.parquet"
    write_log(log)
    ways: dict[str, Callable[[int], None]] = {
        "CCE": lambda num_rows: by_train(log, "cce", num_rows),
        "full": lambda num_rows: by_train(log, "full", num_rows),
        "script": lambda num_rows: by_script(log, num_rows),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS + 1):
        for name, way in ways.items():
            started = time.process_time()
            way(FEW)
            between = time.process_time()
            way(MANY)
            if number > 0:  # the first has loaded the compiled loops
                seconds[name].append((time.process_time() - between) - (between - started))
    speed = {name: (MANY - FEW) / statistics.median(each) for name, each in seconds.items()}
    shape = f"d = {DIM}, {len(SIZES)} tables, batch {BATCH}, {NUM_DENSE} dense fields"
    for name, target in (("full", 1.15), ("script", 0.95)):
        report(
            f"rows a CPU second of train with CCE tables on Parquet, over {name}",
            speed["CCE"] / speed[name],
            target=f"≥ {target}",
            holds=speed["CCE"] / speed[name] >= target,
            against=f"{'full tables in train' if name == 'full' else 'a plain script with the same CCE tables'}, "
            f"{speed[name]:,.0f} rows; with CCE {speed['CCE']:,.0f}; {shape}",
        )


if __name__ == "__main__":
    main()
