"""Batches from remapped data against batches from the raw log, looked up in a map of 10^8 IDs as they are read.

Both end where a model's tables begin: a KeyedJaggedTensor of rows. Then the same files with the lookup that follows,
forward and backward, from rows and from words. Each reading is a fresh process of one thread; readings alternate,
medians are reported.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torchrec import EmbeddingBagConfig

from benchmarks.figure import report
from benchmarks.processes import fresh, mapping_bytes, memory_bytes
from torchrec_cce import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig, Registry
from torchrec_cce.data.batches import global_batches
from torchrec_cce.data.parquet import read_parquet
from torchrec_cce.data.remapped import RemappedLog
from torchrec_cce.data.remapped_format import HelperPolicy
from torchrec_cce.data.rows import to_batch
from torchrec_cce.jobs.remap.job import remap

NUM_IDS, NUM_COLUMNS, NUM_ROWS = 100_000_000, 4, 4096
ROWS, FEATURES, BATCH = 600_000, 8, 4096
ROUNDS = 3


def collection(*, use_helper: bool) -> CCEEmbeddingBagCollection:
    """One table of all features, and a small full one beside it."""
    return CCEEmbeddingBagCollection(
        tables=[
            CCEEmbeddingBagConfig(
                name="ids",
                feature_names=[f"f{i}" for i in range(FEATURES)],
                num_embeddings=NUM_IDS,
                embedding_dim=16,
                num_columns=NUM_COLUMNS,
                num_rows=NUM_ROWS,
                use_helper=use_helper,
            ),
            EmbeddingBagConfig(name="day", feature_names=["day"], num_embeddings=7, embedding_dim=16),
        ]
    )


def prepare(folder: Path) -> None:
    """A log of Zipf's IDs in zstd Parquet, a registry with the map, and the log remapped in three ways."""
    rng = np.random.default_rng(0)
    model = collection(use_helper=True)
    start = model.pointer_map("ids")
    pointers = rng.integers(0, NUM_ROWS, (NUM_IDS, NUM_COLUMNS), dtype=np.uint16)
    model.attach_pointer_map("ids", start.clustered(pointers, start.next_helper_hash(0)))
    Registry(folder / "registry").publish(model.snapshot())
    table = {f"f{i}": NUM_IDS ** rng.random(ROWS) for i in range(FEATURES)}
    log = pa.table(
        {
            "label": rng.integers(0, 2, ROWS).astype(np.int8),
            "day": rng.integers(0, 7, ROWS).astype(np.int8),
            **{name: (ids - 1).astype(np.int64) for name, ids in table.items()},
        }
    )
    (folder / "raw").mkdir()
    pq.write_table(log, folder / "raw" / "log.parquet", compression="zstd")
    for helper in ("store", "keep-raw", "drop"):
        remap(str(folder / "raw"), str(folder / helper), registry=str(folder / "registry"), helper=helper)


def read(folder: Path, helper: HelperPolicy | None, use_helper: bool) -> dict[str, float]:
    """Read all batches once, after one reading that warms up; None is the raw log. CPU seconds, and MiB resident."""
    model = collection(use_helper=use_helper)
    Registry(folder / "registry").open().attach(model)
    features = [feature for _, feature in model.remap.table_features]
    log = RemappedLog(model.remap, label="label", universes={"day": 7})

    def read_all() -> None:
        if helper is None:
            raw = read_parquet(folder / "raw", label="label", ids={feature: feature for feature in features})
            for rows in global_batches(raw, BATCH):
                model.remap(to_batch(rows, features).sparse_features)
        else:
            for packed in global_batches(log.read(folder / helper), BATCH):
                to_batch(log.to_rows(packed), model.remap.row_keys)

    read_all()
    began, cpu = time.perf_counter(), time.process_time()
    read_all()
    seconds = {"wall": time.perf_counter() - began, "cpu": time.process_time() - cpu}
    sizes = mapping_bytes(".pointers.arrow")
    mebibytes = {"map": sizes["Rss"], "mapped": sizes["Size"], "resident": memory_bytes("VmRSS")}
    return {**seconds, **{what: size / 2**20 for what, size in mebibytes.items()}}


def look_up(folder: Path, helper: HelperPolicy, use_helper: bool, as_words: bool) -> float:
    """Read all batches and look them up once, forward and backward, after one reading that warms up. CPU seconds."""
    model = collection(use_helper=use_helper)
    Registry(folder / "registry").open().attach(model)
    log, form = RemappedLog(model.remap, label="label", universes={"day": 7}), model.remap.word_form
    assert form is not None
    finish, keys = (log.to_words, form.keys) if as_words else (log.to_rows, model.remap.row_keys)

    def look_all_up() -> None:
        for packed in global_batches(log.read(folder / helper), BATCH):
            model(to_batch(finish(packed), keys).sparse_features).values().sum().backward()
            model.zero_grad()

    look_all_up()
    cpu = time.process_time()
    look_all_up()
    return time.process_time() - cpu


def remapped_reading_figures() -> None:
    kinds: dict[str, tuple[HelperPolicy | None, bool]] = {
        "raw": (None, True),
        "store": ("store", True),
        "keep-raw": ("keep-raw", True),
        "raw, no helper": (None, False),
        "drop": ("drop", False),
    }
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    looked_up: dict[tuple[str, bool], list[float]] = {
        (kind, as_words): [] for kind, (helper, _) in kinds.items() if helper is not None for as_words in (False, True)
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fresh(prepare, folder)
        for _ in range(ROUNDS):
            for kind, (helper, use_helper) in kinds.items():
                found[kind].append(fresh(read, folder, helper, use_helper))
            for (kind, as_words), seconds in looked_up.items():
                seconds.append(fresh(look_up, folder, *kinds[kind], as_words))
        sizes = {
            each: sum(f.stat().st_size for f in (folder / each).glob("*.parquet"))
            for each in ("raw", "store", "keep-raw", "drop")
        }

    def median(kind: str, what: str) -> float:
        return statistics.median(reading[what] for reading in found[kind])

    log = f"{ROWS:,} rows, {FEATURES} features of a map of {NUM_IDS:,} IDs, {NUM_COLUMNS} × uint16, batches of {BATCH}"
    for kind, other in (("store", "raw"), ("keep-raw", "raw"), ("drop", "raw, no helper")):
        against = f"raw zstd Parquet, remapped as it is read, to the same batches; {log}; CPU seconds"
        report(
            f"remapped data ({kind}), times the rows/s of raw data",
            median(other, "cpu") / median(kind, "cpu"),
            against=against,
        )
        by_rows, by_words = (statistics.median(looked_up[kind, as_words]) for as_words in (False, True))
        report(
            f"remapped data ({kind}), read and looked up as words, times the rows/s as rows",
            by_rows / by_words,
            target="≥ 1.1",
            holds=by_rows / by_words >= 1.1,
            against=f"as rows: {ROWS / by_rows:,.0f}, as words: {ROWS / by_words:,.0f}; forward and backward; {log}",
        )
        report(
            f"remapped data ({kind}), rows/s",
            ROWS / median(kind, "cpu"),
            against=f"raw: {ROWS / median(other, 'cpu'):,.0f}",
        )
        report(
            f"remapped data ({kind}), MiB of the map resident",
            median(kind, "map"),
            target="≤ 1",
            holds=median(kind, "map") <= 1,
            against=f"{median(kind, 'mapped'):,.0f} MiB mapped; raw: {median(other, 'map'):,.0f} MiB resident",
        )
        report(
            f"remapped data ({kind}), MiB resident in all",
            median(kind, "resident"),
            against=f"raw: {median(other, 'resident'):,.0f}",
        )
        report(f"remapped data ({kind}), size of the files", sizes[kind] / sizes["raw"], against="raw zstd Parquet")


if __name__ == "__main__":
    remapped_reading_figures()
