"""Dense IDs: numbered by first appearance, decodable, the same for any chunking."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.plain_rows import assert_same, bags_of, column, cut, joined, numbered, rows
from torchrec_cce.data.criteo import read_criteo
from torchrec_cce.data.parquet import read_parquet
from torchrec_cce.data.rows import Column, Rows
from torchrec_cce.data.tsv import CATEGORICAL_FEATURES, DENSE_FEATURES
from torchrec_cce.errors import InvalidIDError
from torchrec_cce.experiments.dense_ids import DenseIDs, write_dense


def only(bags: list[list[int]]) -> Rows:
    size = len(bags)
    return Rows(labels=np.zeros(size, np.float32), dense=np.zeros((size, 0), np.float32), ids={"f": column(bags)})


@given(rows(), st.lists(st.integers(0, 5), max_size=4))
def test_numbered_by_first_appearance(whole: Rows, sizes: list[int]) -> None:
    encoder = DenseIDs.collect(cut(whole, sizes))
    dense = encoder.encode(whole)
    for feature in whole.ids:
        order = list(dict.fromkeys(whole.ids[feature].values.tolist()))
        assert encoder.raw[feature].tolist() == order
        assert encoder.num_embeddings[feature] == len(order)
        assert bags_of(dense.ids[feature]) == [[order.index(key) for key in bag] for bag in bags_of(whole.ids[feature])]
    np.testing.assert_array_equal(dense.labels, whole.labels)


def test_many_merges_keep_the_order() -> None:
    keys = np.random.default_rng(0).integers(-50_000, 50_000, size=200_000)
    whole = Rows(
        labels=np.zeros(len(keys), np.float32),
        dense=np.zeros((len(keys), 0), np.float32),
        ids={"f": Column(values=keys)},
    )
    encoder = DenseIDs.collect(cut(whole, [100] * 2000))
    assert encoder.raw["f"].tolist() == list(dict.fromkeys(keys.tolist()))
    np.testing.assert_array_equal(encoder.raw["f"][encoder.encode(whole).ids["f"].values], keys)


def test_unseen_ids_are_refused() -> None:
    encoder = DenseIDs.collect([only([[5], [], [-3]])])
    for key in (-4, 0, 6):
        with pytest.raises(InvalidIDError, match=f"feature 'f': raw ID {key} was not collected"):
            encoder.encode(only([[5], [key]]))
    with pytest.raises(InvalidIDError, match="raw ID 5 was not collected"):
        DenseIDs.collect([only([[], []])]).encode(only([[5]]))
    with pytest.raises(InvalidIDError, match=r"feature 'a' was not collected; these were: \['f'\]"):
        encoder.encode(numbered(2))


def test_logs_share_one_numbering(tmp_path: Path) -> None:
    train, test = only([[70], [50], [70, 20], []]), only([[20], [90], [], [50]])
    paths = tmp_path / "train.parquet", tmp_path / "test.parquet"
    encoder = write_dense({paths[0]: lambda: [train], paths[1]: lambda: cut(test, [1, 2])}, multi_hot=["f"])
    assert encoder.num_embeddings == {"f": 4}
    read = [joined(list(read_parquet(path, label="label", ids={"f": "f"}))) for path in paths]
    assert_same(read[0], only([[0], [1], [0, 2], []]))
    assert_same(read[1], only([[2], [3], [], [1]]))


def test_real_log_becomes_dense(real_data: Path, tmp_path: Path) -> None:
    def log() -> list[Rows]:
        return list(read_criteo(real_data / "criteo_80k" / "criteo_80k.tsv.gz", max_rows=20_000))

    path = tmp_path / "dense.parquet"
    encoder = write_dense({path: log}, dense=DENSE_FEATURES)
    raw = joined(log())
    dense = joined(
        list(read_parquet(path, label="label", dense=DENSE_FEATURES, ids={f: f for f in CATEGORICAL_FEATURES}))
    )
    np.testing.assert_array_equal(dense.dense, raw.dense)
    for feature, part in dense.ids.items():
        assert part.values.max() == encoder.num_embeddings[feature] - 1
        np.testing.assert_array_equal(encoder.raw[feature][part.values], raw.ids[feature].values)
