"""Synthetic logs: repeatable, in Criteo's layout, with the structure that was planted."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from tests.support.plain_rows import assert_same, joined
from torchrec_cce.data.criteo import read_criteo
from torchrec_cce.data.rows import Rows, bound
from torchrec_cce.errors import ConfigError
from torchrec_cce.experiments.planted_log import ClickModel, SyntheticLog, write_click_log

TINY = SyntheticLog(universes=(500, 5000, 3, *[20] * 22, 4000), large=1000, clusters=16)


def read(path: Path) -> Rows:
    return joined(list(read_criteo(path)))


def test_same_arguments_same_bytes(tmp_path: Path) -> None:
    for name in ("a.tsv.gz", "b.tsv.gz", "a.tsv", "b.tsv"):
        write_click_log(tmp_path / name, num_rows=3000, seed=5, log=TINY)
    assert (tmp_path / "a.tsv.gz").read_bytes() == (tmp_path / "b.tsv.gz").read_bytes()
    assert (tmp_path / "a.tsv").read_bytes() == (tmp_path / "b.tsv").read_bytes()
    assert_same(read(tmp_path / "a.tsv.gz"), read(tmp_path / "a.tsv"))
    write_click_log(tmp_path / "c.tsv", num_rows=3000, seed=6, log=TINY)
    assert (tmp_path / "a.tsv").read_bytes() != (tmp_path / "c.tsv").read_bytes()


def test_longer_log_begins_with_the_shorter_one(tmp_path: Path) -> None:
    truth = write_click_log(tmp_path / "long.tsv", num_rows=70_000, seed=5, log=TINY)
    write_click_log(tmp_path / "short.tsv", num_rows=1234, seed=5, log=TINY)
    long = (tmp_path / "long.tsv").read_bytes()
    assert long.startswith((tmp_path / "short.tsv").read_bytes())
    assert long.count(b"\n") == 70_000
    rows = read(tmp_path / "long.tsv")
    assert truth.click_rate == pytest.approx(rows.labels.mean(), abs=1e-6)


def test_log_is_what_the_parameters_say(tmp_path: Path) -> None:
    path = tmp_path / "log.tsv"
    truth = write_click_log(path, num_rows=60_000, seed=3)
    rows = read(path)
    log = SyntheticLog()
    assert truth.universes == {f"C{i + 1}": n for i, n in enumerate(log.universes)}
    assert bound(rows, truth.universes).ids["C3"].values is rows.ids["C3"].values
    for feature, size in truth.universes.items():
        assert 0 <= rows.ids[feature].values.min() <= rows.ids[feature].values.max() < size
    assert truth.click_rate == pytest.approx(log.click_rate, abs=0.01)
    cells = np.array([line.split(b"\t") for line in path.read_bytes().splitlines()])
    empty = (cells == b"").mean(axis=0)
    small = [14 + i for i, n in enumerate(log.universes) if n < log.large]
    np.testing.assert_allclose(empty[[*range(1, 14), *small]], log.missing, atol=0.005)
    assert empty.sum() == pytest.approx(empty[[*range(1, 14), *small]].sum())
    assert set(map(len, cells[:, 16])) == {8}


def test_bayes_auc_is_that_of_the_logits() -> None:
    model = ClickModel(TINY, seed=3)
    (block,) = model.blocks(20_000)
    assert roc_auc_score(block.labels, block.logits) > 0.8


def test_bayes_auc_with_ties(tmp_path: Path) -> None:
    flat = replace(TINY, main=0, interaction=0, individual=0, dense=0, small=0)
    truth = write_click_log(tmp_path / "flat.tsv", num_rows=1000, seed=1, log=flat)
    assert truth.bayes_auc == 0.5
    truth = write_click_log(tmp_path / "log.tsv", num_rows=1000, seed=1, log=TINY)
    (block,) = ClickModel(TINY, seed=1).blocks(1000)
    assert truth.bayes_auc == pytest.approx(roc_auc_score(block.labels, block.logits))


def test_parts_have_the_deviations_asked_for() -> None:
    for part in ("main", "interaction", "individual", "small", "dense"):
        alone = replace(TINY, main=0, interaction=0, individual=0, small=0, dense=0)
        (block,) = ClickModel(replace(alone, **{part: 1.5}), seed=2).blocks(30_000)
        assert block.logits.std() == pytest.approx(1.5, rel=0.05), part
    assert np.ptp(next(ClickModel(alone, seed=2).blocks(1000)).logits) == 0


def test_zipf() -> None:
    (block,) = ClickModel(replace(TINY, zipf=1.0), seed=2).blocks(60_000)
    counts = np.sort(np.bincount(block.ids[1]))[::-1]
    expected = 60_000 / np.arange(1, 5001) / (1 / np.arange(1, 5001)).sum()
    np.testing.assert_allclose(counts[:20], expected[:20], rtol=0.15)
    # The popular IDs are not those with small numbers.
    assert np.argsort(np.bincount(block.ids[1]))[-20:].mean() > 500


def group_score(groups: np.ndarray, labels: np.ndarray, train: int) -> np.ndarray:
    """Smoothed click rate of each row's group, from the first `train` rows, as a log odds for the others."""
    clicks = np.bincount(groups[:train], labels[:train], minlength=groups.max() + 1)
    shown = np.bincount(groups[:train], minlength=groups.max() + 1)
    rate = (clicks + 2.5) / (shown + 10)
    return np.asarray(np.log(rate / (1 - rate))[groups[train:]])


def test_clusters_carry_the_signal_and_random_groups_do_not() -> None:
    """A naive Bayes model on hidden clusters beats one on as many random groups, and the small features alone."""
    log = SyntheticLog()
    model = ClickModel(log, seed=1)
    blocks = list(model.blocks(131_072))
    ids = np.maximum(np.concatenate([block.ids for block in blocks], axis=1), 0)
    labels = np.concatenate([block.labels for block in blocks])
    logits = np.concatenate([block.logits for block in blocks])
    train, generator = 100_000, np.random.default_rng(0)
    small = sum(group_score(ids[i], labels, train) for i in range(26) if i not in model.large)
    auc = {"bayes": roc_auc_score(labels[train:], logits[train:]), "small": roc_auc_score(labels[train:], small)}
    pointers = {
        "id": {i: np.arange(log.universes[i]) for i in model.large},
        "cluster": model.clusters,
        "hash": {i: generator.integers(log.clusters, size=log.universes[i]) for i in model.large},
    }
    for name, pointer in pointers.items():
        score = small + sum(group_score(pointer[i][ids[i]], labels, train) for i in model.large)
        auc[name] = roc_auc_score(labels[train:], score)
    assert auc["small"] < 0.62
    assert auc["small"] + 0.02 < auc["hash"] < auc["id"] - 0.04
    assert auc["id"] < auc["cluster"] < auc["bayes"] < 0.9


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"universes": (5, 6)}, r"universes=\(5, 6\) must be 26 sizes"),
        ({"universes": (0,) * 26}, "must be 26 sizes in 1"),
        ({"clusters": 0}, "clusters=0 must be in 1..1000"),
        ({"vector_dim": 0}, "vector_dim=0 at least 1"),
        ({"noise": -0.1}, "must be at least 0"),
        ({"click_rate": 1.0}, "within 0..1"),
        ({"missing": 1.0}, "within 0..1"),
    ],
)
def test_impossible_logs(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SyntheticLog(), **changed)  # type: ignore[arg-type]


def test_impossible_sizes(tmp_path: Path) -> None:
    for num_rows, seed in ((0, 1), (5, -1)):
        with pytest.raises(ConfigError, match="num_rows="):
            write_click_log(tmp_path / "log.tsv", num_rows=num_rows, seed=seed)
    assert not list(tmp_path.iterdir())
