"""Arbitrary 64-bit raw IDs of a real log: counted, looked up, clustered, published, and unseen tomorrow; and logs
remapped and trained on.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from torchrec import KeyedJaggedTensor

from tests.support import runs
from torchrec_cce import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig, ReclusterConfig, Registry
from torchrec_cce.data.criteo import read_criteo
from torchrec_cce.data.parquet import write_parquet
from torchrec_cce.data.remapped_format import HelperPolicy
from torchrec_cce.data.rows import bound
from torchrec_cce.data.vocabulary import BuiltVocabulary, build_vocabulary
from torchrec_cce.jobs.remap.job import remap
from torchrec_cce.training.config import RunConfig, parse_config
from torchrec_cce.training.loop import train

ROWS = 400_000
FEATURES = ("user", "article")


@pytest.fixture(scope="module")
def days(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pa.Table]:
    """The first clicks of the log as a file, and those after them."""
    rows = pq.ParquetFile(real_data / "globo" / "globo_ctr.parquet").iter_batches(ROWS, columns=list(FEATURES))
    today, tomorrow = (pa.Table.from_batches([next(rows)]) for _ in range(2))
    path = tmp_path_factory.mktemp("globo") / "today.parquet"
    pq.write_table(today, path, row_group_size=50_000)
    return path, tomorrow


@pytest.fixture(scope="module")
def built(days: tuple[Path, pa.Table]) -> dict[str, BuiltVocabulary]:
    return {name: build_vocabulary(days[0], columns=[name], min_frequency=3, num_threads=2) for name in FEATURES}


@pytest.mark.parametrize("name", FEATURES)
def test_vocabulary_equals_arrows_count(
    days: tuple[Path, pa.Table], built: dict[str, BuiltVocabulary], name: str
) -> None:
    counted = pc.value_counts(pq.read_table(days[0]).column(name).combine_chunks())
    expected = {key: n for key, n in zip(*(field.to_pylist() for field in counted.flatten()), strict=True) if n >= 3}
    one = built[name]
    assert dict(zip(one.vocabulary.keys().tolist(), one.frequencies.tolist(), strict=True)) == expected
    assert one.report.rows == ROWS
    assert one.report.kept == len(expected) < one.report.distinct
    assert 0.5 < one.report.coverage < 1


def test_clustered_published_and_met_by_the_ids_of_tomorrow(
    days: tuple[Path, pa.Table], built: dict[str, BuiltVocabulary], tmp_path: Path
) -> None:
    def collection() -> CCEEmbeddingBagCollection:
        torch.manual_seed(0)
        return CCEEmbeddingBagCollection(
            tables=[
                CCEEmbeddingBagConfig(
                    name=f"t_{name}", feature_names=[name], num_embeddings=10**6, embedding_dim=16, num_rows=64
                )
                for name in FEATURES
            ]
        )

    trained, serving = collection(), collection()
    for name in FEATURES:
        start = trained.pointer_map(f"t_{name}")
        trained.attach_pointer_map(f"t_{name}", start.with_vocabulary(built[name].vocabulary))
    frequencies = {f"t_{name}": built[name].frequencies for name in FEATURES}
    reports = trained.recluster(seed=0, frequencies=frequencies, settings=ReclusterConfig(num_iterations=5))
    registry = Registry(tmp_path / "registry", cache=tmp_path / "cache")
    registry.publish(trained.snapshot(reports, frequencies))
    registry.open().attach(serving)

    ids = {name: days[1].column(name).to_numpy() for name in FEATURES}
    batch = KeyedJaggedTensor.from_lengths_sync(
        keys=list(FEATURES),
        values=torch.from_numpy(np.concatenate(list(ids.values()))),
        lengths=torch.ones(2 * ROWS, dtype=torch.int32),
    )
    assert torch.equal(serving(batch).values(), trained(batch).values())
    unseen = {f"t_{n}": int((~np.isin(ids[n], built[n].vocabulary.keys())).sum()) for n in FEATURES}
    assert serving.unseen_ids() == unseen
    assert all(0.02 * ROWS < count < ROWS for count in unseen.values()), "a log in time order has new IDs every day"


def run_config(
    path: Path, registry: Path, *, tables: dict[str, Any], dense: tuple[str, ...] = (), **changes: Any
) -> RunConfig:
    """40 batches of 500 rows, then validation and test."""
    values: dict[str, Any] = {
        "data": {
            "format": "parquet",
            "dense": dense,
            "train": {"path": str(path), "max_rows": 20_000},
            "validation": {"path": str(path), "skip_rows": 20_000, "max_rows": 3000},
            "test": {"path": str(path), "skip_rows": 23_000, "max_rows": 3000},
        },
        "tables": tables,
        "embedding": {"max_parameters": 8000},
        "registry": {"url": str(registry), "start": "current"},
        "training": {"batch_size": 500, "evaluate_every": 20},
    }
    return parse_config({**values, **{name: {**values.get(name, {}), **each} for name, each in changes.items()}})


def assert_measures_the_same(
    raw: Path, helper: HelperPolicy, registry: Path, folder: Path, **settings: Any
) -> dict[str, float]:
    """Trained on raw IDs and on pointers: every number of the metrics is the same."""
    output = folder / helper
    remap(str(raw), str(output), registry=str(registry), helper=helper, num_workers=1)
    settings["embedding"] = {"use_helper": helper != "drop"}
    runs_of = [
        train(
            run_config(path, registry, **settings, data={"format": kind}),
            folder / f"{helper}-{kind}",
            show_progress=False,
        )
        for path, kind in ((raw, "parquet"), (output, "remapped"))
    ]
    assert runs.metrics(folder / f"{helper}-parquet") == runs.metrics(folder / f"{helper}-remapped")
    assert runs_of[0].best == runs_of[1].best
    assert runs_of[0].best is not None
    assert 0.5 < runs_of[0].best["test_auc"] < 1
    return runs_of[0].best


@pytest.mark.usefixtures("one_thread")
def test_globo_remapped_trains_as_raw(real_data: Path, built: dict[str, BuiltVocabulary], tmp_path: Path) -> None:
    """IDs of 64 bits, of which some are in no vocabulary; a small table that is hashed to its universe."""
    raw = tmp_path / "raw" / "log.parquet"
    raw.parent.mkdir()
    columns = ["label", *FEATURES, "referrer"]
    rows = pq.ParquetFile(real_data / "globo" / "globo_ctr.parquet").iter_batches(26_000, columns=columns)
    pq.write_table(pa.Table.from_batches([next(rows)]), raw, row_group_size=20_000)
    large = {f"t_{name}": {"num_embeddings": 10**6, "features": [name]} for name in FEATURES}
    tables = {**large, "referrer": 5}
    collection = CCEEmbeddingBagCollection(tables=run_config(raw, tmp_path, tables=tables).table_configs())
    for name in FEATURES:
        start = collection.pointer_map(f"t_{name}")
        collection.attach_pointer_map(f"t_{name}", start.with_vocabulary(built[name].vocabulary))
    collection.recluster(seed=0, settings=ReclusterConfig(num_iterations=3))
    Registry(tmp_path / "registry").publish(collection.snapshot())
    registry, folder = tmp_path / "registry", tmp_path / "runs"
    stored, dropped = (
        assert_measures_the_same(raw, helper, registry, folder, tables=tables) for helper in ("store", "drop")
    )
    assert stored != dropped


@pytest.mark.usefixtures("one_thread")
def test_criteo_remapped_trains_as_raw(real_data: Path, tmp_path: Path) -> None:
    """IDs within a universe, which the log was brought into, and dense columns."""
    large, small = ("C3", "C12", "C21"), ("C9", "C6")
    universes = dict.fromkeys(large, 20_000) | dict.fromkeys(small, 30)
    rows = read_criteo(real_data / "criteo_80k" / "criteo_80k.tsv.gz", max_rows=26_000)
    dense = [f"I{i}" for i in range(1, 14)]
    raw = tmp_path / "raw" / "log.parquet"
    raw.parent.mkdir()
    write_parquet(raw, (bound(part, universes) for part in rows), dense=dense)
    settings = {"tables": universes, "dense": tuple(dense)}
    collection = CCEEmbeddingBagCollection(tables=run_config(raw, tmp_path, **settings).table_configs())
    assert collection.cce_tables() == list(large)
    collection.recluster(seed=0, settings=ReclusterConfig(num_iterations=3))
    Registry(tmp_path / "registry").publish(collection.snapshot())
    assert_measures_the_same(raw, "keep-raw", tmp_path / "registry", tmp_path / "runs", **settings)
