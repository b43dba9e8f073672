"""The examples for Criteo's two logs run as they stand on logs of the same layout, but for sizes."""

import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support import runs
from tests.support.documents import ROOT
from torchrec_cce import CCEEmbeddingBagConfig
from torchrec_cce.data.criteo import KAGGLE_UNIVERSES
from torchrec_cce.experiments.planted_log import write_click_log
from torchrec_cce.training import loop
from torchrec_cce.training.config import RunConfig, TableConfig, parse_config
from torchrec_cce.training.config_file import read_config

KAGGLE_ROWS = 45_840_617
NUM_ROWS = 4_800


def example(name: str) -> RunConfig:
    return read_config(ROOT / "examples" / f"{name}.toml")


def small(config: RunConfig, *, data: dict[str, Any], batches: int) -> RunConfig:
    """With 26 tables of at most 2000 rows, `batches` between two clusterings, and whatever rows `data` says."""
    tables = {name: TableConfig(num_embeddings=min(size, 2000)) for name, size in KAGGLE_UNIVERSES.items()}
    values = replace(config, tables=tables).as_dict()
    values["data"] |= data
    values["recluster"] |= {"ct": 1, "cf": batches}
    values["training"] |= {"epochs": 1, "evaluate_every": batches, "checkpoint_every": None}
    return parse_config(values)


def compressed(config: RunConfig) -> set[str]:
    return {table.name for table in config.table_configs() if isinstance(table, CCEEmbeddingBagConfig)}


def kinds(run_dir: Path) -> dict[str, int]:
    found = [record["kind"] for record in runs.metrics(run_dir)]
    return {kind: found.count(kind) for kind in found}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_click_log(tmp_path / "train.txt", num_rows=NUM_ROWS, seed=0)
    return tmp_path


@pytest.mark.parametrize("name", ["criteo_kaggle", "criteo_terabyte"])
def test_they_have_the_tables_of_the_kaggle_log(name: str) -> None:
    config = example(name)
    assert config.universes() == KAGGLE_UNIVERSES
    assert compressed(config) == {
        name
        for name, size in KAGGLE_UNIVERSES.items()
        if size * config.embedding.dim > (config.embedding.max_parameters or 0)
    }


def test_kaggle(workplace: Path) -> None:
    config = example("criteo_kaggle")
    train, validation, test = config.data.train, config.data.validation, config.data.test
    assert validation is not None
    assert test is not None
    # Days of a seventh each, the last one in halves, the first of them to test.
    assert train.max_rows == test.skip_rows == KAGGLE_ROWS - KAGGLE_ROWS // 7
    assert test.max_rows == -(-(KAGGLE_ROWS // 7) // 2)
    assert validation.skip_rows == test.skip_rows + test.max_rows
    assert validation.max_rows is not None
    assert validation.skip_rows + validation.max_rows == KAGGLE_ROWS
    assert config.recluster.cf == -(-train.max_rows // config.training.batch_size)

    def scaled(rows: int | None) -> int | None:
        return None if rows is None else rows * NUM_ROWS // KAGGLE_ROWS

    splits = {
        name: {"path": split.path, "skip_rows": scaled(split.skip_rows), "max_rows": scaled(split.max_rows)}
        for name, split in (("train", train), ("validation", validation), ("test", test))
    }
    batches = -(-(NUM_ROWS * 6 // 7) // config.training.batch_size)
    config = small(config, data=splits, batches=batches)
    result = loop.train(config, workplace / "run", show_progress=False)
    assert result.steps == batches
    clustered = len(compressed(config))
    assert kinds(workplace / "run") == {"train": 1, "recluster": clustered, "validation": 1, "test": 1}


def test_terabyte(workplace: Path) -> None:
    """On 24 files as they are named there; nothing of the splits is changed."""
    config = small(example("criteo_terabyte"), data={}, batches=1)
    lines = (workplace / "train.txt").read_bytes().splitlines(keepends=True)
    for day in range(24):
        (workplace / f"day_{day}.gz").write_bytes(gzip.compress(b"".join(lines[200 * day : 200 * (day + 1)])))
    result = loop.train(config, workplace / "run", show_progress=False)
    assert result.steps == -(-23 * 200 // 8 // config.training.batch_size)
    clustered = len(compressed(config))
    assert kinds(workplace / "run") == {"train": 1, "recluster": clustered, "validation": 3, "test": 3}

    (workplace / "day_12.gz").unlink()
    fewer = loop.train(config, workplace / "fewer", show_progress=False)
    assert fewer.steps == -(-22 * 200 // 8 // config.training.batch_size)
