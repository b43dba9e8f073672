"""All of two real logs remapped and trained from, against training on their raw IDs. Reads `TORCHREC_CCE_DATA`."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.figure import report
from torchrec_cce import CCEEmbeddingBagCollection
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.data.criteo import read_criteo
from torchrec_cce.data.parquet import write_parquet
from torchrec_cce.data.remapped_format import HelperPolicy
from torchrec_cce.data.rows import bound
from torchrec_cce.data.tsv import CATEGORICAL_FEATURES, DENSE_FEATURES
from torchrec_cce.data.vocabulary import build_vocabulary
from torchrec_cce.jobs.remap.job import remap
from torchrec_cce.maps.registry import Registry
from torchrec_cce.training.config import RunConfig, parse_config
from torchrec_cce.training.loop import train

DATA = "TORCHREC_CCE_DATA"
CLUSTERING = ReclusterConfig(num_iterations=10)


def remapped_logs_figures() -> None:
    source = os.environ.get(DATA)
    if source is None:
        print(f"remapped logs are skipped: {DATA} does not name the folder that holds them", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as name:
        os.environ["TORCHREC_CCE_CACHE"] = str(Path(name) / "cache")
        _globo(Path(source) / "globo" / "globo_ctr.parquet", Path(name))
        _criteo(Path(source) / "criteo_80k" / "criteo_80k.tsv.gz", Path(name))


def _globo(log: Path, folder: Path) -> None:
    """Keys of 64 bits, by vocabularies."""
    raw = folder / "globo" / log.name
    raw.parent.mkdir()
    shutil.copy(log, raw)
    tables = {f"t_{name}": {"num_embeddings": 300_000, "features": [name]} for name in ("user", "article")}
    settings: dict[str, Any] = {"tables": tables, "registry": {"url": str(folder / "globo-maps"), "start": "current"}}
    collection = CCEEmbeddingBagCollection(tables=_config(raw, "parquet", **settings).table_configs())
    for name in ("user", "article"):
        vocabulary = build_vocabulary(log, columns=[name]).vocabulary
        collection.attach_pointer_map(
            f"t_{name}", collection.pointer_map(f"t_{name}").with_vocabulary(vocabulary, unseen="hash")
        )
    collection.recluster(seed=0, settings=CLUSTERING)
    Registry(folder / "globo-maps").publish(collection.snapshot())
    _compare("globo", raw, folder, "store", settings)


def _criteo(log: Path, folder: Path) -> None:
    """All 26 features and 13 dense columns."""
    universes = dict.fromkeys(CATEGORICAL_FEATURES, 20_000)
    raw = folder / "criteo" / "log.parquet"
    raw.parent.mkdir()
    write_parquet(raw, (bound(part, universes) for part in read_criteo(log)), dense=DENSE_FEATURES)
    settings: dict[str, Any] = {
        "tables": universes,
        "registry": {"url": str(folder / "criteo-maps"), "start": "current"},
        "dense": DENSE_FEATURES,
    }
    collection = CCEEmbeddingBagCollection(tables=_config(raw, "parquet", **settings).table_configs())
    collection.recluster(seed=0, settings=CLUSTERING)
    Registry(folder / "criteo-maps").publish(collection.snapshot())
    _compare("criteo_80k", raw, folder, "keep-raw", settings)


def _compare(name: str, raw: Path, folder: Path, helper: HelperPolicy, settings: dict[str, Any]) -> None:
    output = folder / f"{name}-remapped"
    done = remap(str(raw.parent), str(output), registry=settings["registry"]["url"], helper=helper, inverse_check=True)
    against = f"training on the raw file, one epoch; all {done.num_rows:,} rows, helper policy {helper}"
    report(f"{name}: rows that the inverse check proved", done.checked_rows, against="map and raw file")
    found = {}
    for kind, path in (("parquet", raw), ("remapped", output / raw.name)):
        started = time.process_time()
        result = train(_config(path, kind, **settings), folder / f"{name}-{kind}", show_progress=False)
        found[kind] = result.best, time.process_time() - started
    (before, raw_seconds), (after, seconds) = found["parquet"], found["remapped"]
    assert before is not None
    report(f"{name}: test AUC, trained from remapped data", (after or {})["test_auc"], against=against)
    same = before == after
    report(f"{name}: measures that differ", 0 if same else 1, target="0", holds=same, against=against)
    report(f"{name}: a run from remapped data, times as fast", raw_seconds / seconds, against=f"{against}; CPU time")


def _config(path: Path, kind: str, *, dense: tuple[str, ...] = (), **sections: Any) -> RunConfig:
    """Train on four fifths, validate and test on the rest."""
    rows = pq.read_metadata(path).num_rows
    cuts = {"train": (0, rows * 8 // 10), "validation": (rows * 8 // 10, rows // 10), "test": (rows * 9 // 10, None)}
    splits = {
        split: {"path": str(path), "skip_rows": skip} | ({} if most is None else {"max_rows": most})
        for split, (skip, most) in cuts.items()
    }
    return parse_config(
        {
            "data": {"format": kind, "dense": list(dense), **splits},
            "embedding": {"max_parameters": 16_000},
            "training": {"batch_size": 4096},
            **sections,
        }
    )


if __name__ == "__main__":
    remapped_logs_figures()
