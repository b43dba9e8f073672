"""Every method in a whole run: trained, saved, read back, on one rank and on two."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.launch import on_ranks
from tests.support.runs import criteo_config, metrics
from torchrec_cce.methods.registry import METHODS, Method
from torchrec_cce.training.config import RunConfig
from torchrec_cce.training.loop import evaluate, train

CAP = 3200


def config(log: Path, method: Method, **changes: Any) -> RunConfig:
    sections: dict[str, Any] = {
        "embedding": {"method": method, "max_parameters": None if method == "full" else CAP},
        "optimizer": {"embedding_learning_rate": 0.005 if method == "dhe" else 0.05},  # a network takes smaller steps
        "recluster": {"ct": 2, "cf": 8} if method in ("cce", "cce_residents") else {"ct": 0, "cf": 0},
    }
    return criteo_config(log, **{**sections, **changes})


@pytest.mark.parametrize("method", METHODS)
def test_learns_and_is_read_back(method: Method, log: Path, tmp_path: Path) -> None:
    chosen = config(log, method)
    done = train(chosen, tmp_path / "run", show_progress=False)
    losses = [record["bce"] for record in metrics(tmp_path / "run") if record["kind"] == "validation"]
    assert losses[-1] < losses[0]
    assert chosen.data.test is not None
    assert done.best is not None
    again = evaluate(chosen, tmp_path / "run", chosen.data.test)
    if done.best["step"] == done.steps:
        assert (again.bce, again.auc) == (done.best["test_bce"], done.best["test_auc"])
    large = 2 * CAP if method != "full" else 1800 * 16
    assert done.sizes.parameters <= large + 50 * 16


@pytest.mark.parametrize("embedding", ["rowwise_adagrad", "sgd", "adamw"])
def test_only_computed_tables_on_two_ranks(embedding: str, log: Path, tmp_path: Path) -> None:
    """A collection with nothing for TorchRec to shard."""
    chosen = config(log, "robe", tables={"C1": 1000, "C2": 800}, optimizer={"embedding": embedding})
    train(chosen, tmp_path / "alone", show_progress=False)
    for process in on_ranks(tmp_path, 2, _train, chosen, tmp_path / "two"):
        assert process.code == 0, process.stderr
    curves = [
        [record["bce"] for record in metrics(tmp_path / name) if record["kind"] in ("train", "validation", "test")]
        for name in ("alone", "two")
    ]
    assert len(curves[0]) > 5
    np.testing.assert_allclose(*curves, atol=1e-6)


def _train(chosen: RunConfig, folder: Path) -> None:
    train(chosen, folder, show_progress=False)
