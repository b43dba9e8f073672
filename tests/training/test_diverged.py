"""Training that comes to NaN is an error, with the model as it was before; what is no number is null to programs."""

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

from tests.support import runs
from tests.support.launch import on_ranks
from torchrec_cce.cli.main import app
from torchrec_cce.errors import ConfigError, DivergedError
from torchrec_cce.training import checkpoint, loop
from torchrec_cce.training.config import RunConfig
from torchrec_cce.training.input import RankBatch
from torchrec_cce.training.run import Run

GOOD = 6
"""The batches before that whose loss is NaN on one rank."""


def train_into_nan(config: RunConfig, run_dir: Path) -> None:
    real, batches = Run.forward, iter(range(99))

    def forward(run: Run, batch: RankBatch) -> torch.Tensor:
        is_hit = next(batches) == GOOD and run.ranks.rank == run.ranks.world_size - 1
        return real(run, batch) * (math.nan if is_hit else 1)

    with mock.patch.object(Run, "forward", forward):
        runs.train(config, run_dir)


def config(log: Path, **changes: Any) -> RunConfig:
    return runs.criteo_config(log, recluster={"ct": 0, "cf": 0}, **{"training": {"evaluate_every": 999}} | changes)


@pytest.mark.parametrize("in_background", [False, True])
def test_the_checkpoint_is_of_the_last_good_step(log: Path, tmp_path: Path, in_background: bool) -> None:
    training = {"evaluate_every": 999, "checkpoint_in_background": in_background}
    with pytest.raises(DivergedError, match=f"the loss of batch {GOOD + 1} is not .* is of batch {GOOD}, the last be"):
        train_into_nan(config(log, training=training), tmp_path / "run")
    (saved,) = runs.checkpoints(tmp_path / "run")
    assert checkpoint.read_position(saved).step == GOOD
    assert checkpoint.damage_in(tmp_path / "run") == []
    stopped = {"max_rows": GOOD * runs.BATCH_SIZE, "path": str(log)}
    runs.train(config(log, data={"train": stopped}), tmp_path / "shorter")
    mine, theirs = runs.weights(tmp_path / "run"), runs.weights(tmp_path / "shorter")
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name], name


def test_the_status_of_the_command(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = runs.write_toml(tmp_path / "run.toml", config(log))
    monkeypatch.setattr(Run, "forward", lambda *_: torch.tensor(math.inf))
    done = CliRunner().invoke(app, ["train", str(path), "--run-dir", str(tmp_path / "run"), "--quiet"])
    assert done.exit_code == 2
    assert "error: the loss of batch 1 is not a finite number" in done.stderr
    assert not (tmp_path / "run" / "result.json").exists()


def test_on_two_ranks_all_stop(log: Path, tmp_path: Path) -> None:
    """The loss is NaN on one rank: the other one hears of it, and none waits for ever."""
    for rank in on_ranks(tmp_path, 2, train_into_nan, config(log), tmp_path / "run"):
        assert rank.code != 0
        assert f"DivergedError: the loss of batch {GOOD + 1} is not a finite number" in rank.stderr
    (saved,) = runs.checkpoints(tmp_path / "run")
    assert checkpoint.read_position(saved).step == GOOD
    assert len(list(saved.glob("*.distcp"))) == 2
    assert checkpoint.damage_in(tmp_path / "run") == []


def test_weights_that_are_no_numbers_are_not_saved(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older checkpoint stays; a gradient is NaN in the last batch, after which no loss tells."""
    real, steps = Run.descend, iter(range(99))

    def descend(run: Run, loss: torch.Tensor, batch: RankBatch) -> None:
        real(run, loss, batch)
        if next(steps) == runs.BATCHES:
            with torch.no_grad():
                next(run.model.parameters()).fill_(math.inf)

    monkeypatch.setattr(Run, "descend", descend)
    training = {"checkpoint_every": 10, "evaluate_every": 999}
    with pytest.raises(DivergedError, match=r"the weights .* not saved; the newest checkpoint is .*/step-0000000020$"):
        runs.train(runs.criteo_config(log, training=training, recluster={"ct": 0, "cf": 0}), tmp_path / "run")
    (saved,) = runs.checkpoints(tmp_path / "run")
    assert saved.name == "step-0000000020"


def test_what_is_no_number_is_null(log: Path, tmp_path: Path) -> None:
    """All clicks of a split of one row are equal, so that its AUC is none."""
    one_row = {"path": str(log), "max_rows": 1}
    given = runs.criteo_config(log, data={"validation": one_row, "test": one_row}, recluster={"ct": 0, "cf": 0})
    result = runs.train(given, tmp_path / "run")
    assert result.best is not None
    assert math.isnan(result.best["test_auc"])

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    written = json.loads((tmp_path / "run" / "result.json").read_text(), parse_constant=refuse)
    assert written["best"]["test_auc"] is None
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    assert {record["auc"] for record in records if record["kind"] == "test"} == {None}
    done = CliRunner().invoke(app, ["evaluate", str(tmp_path / "run")])
    assert json.loads(done.stdout, parse_constant=refuse)["auc"] is None


@pytest.mark.parametrize("split", ["validation", "test"])
def test_an_empty_split_is_found_before_training(log: Path, tmp_path: Path, split: str) -> None:
    for number, given in enumerate(
        (
            runs.criteo_config(log, data={split: {"path": str(log), "skip_rows": 10**6}}),
            runs.parquet_config(
                runs.write_parquet_log(tmp_path / "log.parquet"),
                data={split: {"path": str(tmp_path / "log.parquet"), "skip_rows": 10**6}},
            ),
        )
    ):
        run = tmp_path / str(number)
        with pytest.raises(ConfigError, match=f"data.{split}: .* no rows to evaluate on"):
            loop.train(given, run, show_progress=False)
        assert not (run / "metrics.jsonl").exists()
