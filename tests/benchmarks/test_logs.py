"""The logs that are measured on: splits that leak nothing."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import logs
from torchrec_cce.data.rows import Column, Rows


def test_chance_is_a_function_of_key_and_purpose_and_is_uniform():
    keys = np.arange(100_000)
    chances = logs.chance(keys, "a")
    assert chances.min() >= 0
    assert chances.max() < 1
    np.testing.assert_array_equal(chances[::-1], logs.chance(keys[::-1], "a"))
    assert not np.array_equal(chances, logs.chance(keys, "b"))
    np.testing.assert_allclose(np.histogram(chances, bins=10, range=(0, 1))[0], 10_000, rtol=0.02)


def test_split_by_chance_takes_every_row_once():
    parts = logs.split_by_chance(np.array([0.05, 0.1, 0.14, 0.16, 0.9]), validation=0.05, test=0.1)
    assert {name: part.tolist() for name, part in parts.items()} == {
        "train": [3, 4],
        "validation": [1, 2],
        "test": [0],
    }


def test_take_reorders_every_part_of_a_row():
    rows = Rows(
        labels=np.array([0, 1, 1], np.float32),
        dense=np.array([[0.0], [1.0], [2.0]], np.float32),
        ids={"f": Column(values=np.array([5, 6, 7]))},
    )
    taken = logs.take(rows, np.array([2, 0]))
    assert taken.labels.tolist() == [1, 0]
    assert taken.dense.tolist() == [[2.0], [0.0]]
    assert taken.ids["f"].values.tolist() == [7, 5]


def test_globo_keeps_pairs_together_and_subsamples_users(tmp_path: Path):
    num_pairs, num_users = 20_000, 400
    rng = np.random.default_rng(0)
    contexts = ("env", "device", "os", "country", "region", "referrer")
    columns = {
        "label": np.tile([1, 0], num_pairs),
        "user": np.repeat(rng.integers(1 << 40, size=num_users)[rng.integers(num_users, size=num_pairs)], 2),
        "article": np.repeat(np.arange(num_pairs), 2),  # here the pair's own number, to find it again
        **{name: rng.integers(3, size=2 * num_pairs) for name in contexts},
    }
    (tmp_path / "globo").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "globo" / "globo_ctr.parquet")
    numbering = logs.prepare_globo(tmp_path, tmp_path / "out")
    splits = {split: pq.read_table(tmp_path / "out" / f"{split}.parquet") for split in logs.SPLITS}

    pairs = {split: set(table["article"].to_pylist()) for split, table in splits.items()}
    assert sum(map(len, pairs.values())) == len(set.union(*pairs.values())) == numbering.num_embeddings["article"]
    assert all(table.num_rows == 2 * len(pairs[split]) for split, table in splits.items())
    assert all(np.mean(table["label"]) == 0.5 for table in splits.values())
    total = sum(table.num_rows for table in splits.values())
    assert splits["test"].num_rows / total == pytest.approx(0.1, abs=0.02)
    assert splits["validation"].num_rows / total == pytest.approx(0.05, abs=0.02)
    assert numbering.num_embeddings["user"] / num_users == pytest.approx(1 / 8, abs=0.05)
    assert np.any(np.diff(splits["train"]["article"].to_numpy()) < 0)  # shuffled


def test_gowalla_tests_on_the_file_of_the_split_and_the_same_users(tmp_path: Path):
    rng = np.random.default_rng(0)
    (tmp_path / "gowalla").mkdir()
    for split, num_rows in (("train", 20_000), ("test", 4_000)):
        table = {name: rng.integers(200, size=num_rows) for name in ("user", "item")}
        table["label"] = np.full(num_rows, split == "test").astype(np.int8)
        pq.write_table(pa.table(table), tmp_path / "gowalla" / f"{split}.parquet")
    numbering = logs.prepare_gowalla(tmp_path, tmp_path / "out")
    splits = {split: pq.read_table(tmp_path / "out" / f"{split}.parquet") for split in logs.SPLITS}
    assert {split: set(table["label"].to_pylist()) for split, table in splits.items()} == {
        "train": {0.0},
        "validation": {0.0},
        "test": {1.0},
    }
    users = numbering.num_embeddings["user"]
    assert users / 200 == pytest.approx(1 / 2, abs=0.1)
    assert all(set(splits[split]["user"].to_pylist()) == set(range(users)) for split in ("train", "test"))
    known = splits["train"].num_rows + splits["validation"].num_rows
    assert splits["validation"].num_rows / known == pytest.approx(0.04, abs=0.01)
