"""What a checkpoint by itself tells of its helper; the job clusters it as it was trained, or not at all."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.support import nights, runs
from tests.support.nights import Night, newest, tensors
from torchrec_cce.cli.main import app
from torchrec_cce.errors import ConfigError
from torchrec_cce.jobs.checkpoint.helper_use import HelperUse
from torchrec_cce.jobs.checkpoint.reader import CCECheckpoint
from torchrec_cce.jobs.recluster.request import foresee
from torchrec_cce.jobs.recluster.thresholds import Thresholds
from torchrec_cce.training.config_file import read_run_config

EASY = Thresholds(
    min_h1=0, min_h2_gain=0, min_learned=0, max_churn=1, max_objective_ratio=100, max_error=1, max_unseen=1
)
NONE = {"C1": False, "C2": False}
ALL = {"C1": True, "C2": True}


@pytest.fixture(scope="module", params=[True, False], ids=["with helper", "without helper"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    embedding = {"max_parameters": runs.MAX_PARAMETERS, "use_helper": request.param}
    return nights.train_a_run(tmp_path_factory.mktemp("trained"), embedding=embedding)


@pytest.fixture
def night(trained: Path, tmp_path: Path) -> Night:
    return Night(tmp_path, trained, thresholds=EASY)


def by_itself(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint as somebody has it who does not use the runs of this package."""
    shutil.copytree(checkpoint, folder)
    return folder


def as_the_run(night: Night) -> dict[str, Any]:
    """The settings that a checkpoint by itself does not say."""
    config = read_run_config(night.run)
    settings = config.recluster.settings()
    return {
        "seed": config.seed,
        "num_iterations": settings.num_iterations,
        "points_per_centroid": settings.points_per_centroid,
        "helper_init": settings.helper_init,
    }


def test_a_checkpoint_by_itself_is_clustered_as_its_run(night: Night) -> None:
    """Or it is refused, with the way out, which is then the right one."""
    has_helper = read_run_config(night.run).embedding.use_helper
    bare = by_itself(newest(night.run), night.folder / "bare")
    job = {**as_the_run(night), "checkpoint": bare, "output": night.folder / "second"}
    if has_helper:
        with pytest.raises(ConfigError, match=r"'C1': .* its helper was trained; leave the table out of `use_helper`"):
            night.recluster(**job, use_helper=NONE)
    else:
        with pytest.raises(ConfigError, match=r"'C1': .* say which, by `use_helper` of 'C1'"):
            night.recluster(**job)
    assert night.versions == [1]
    assert not list(night.folder.glob(".*"))
    night.recluster(**job, use_helper={} if has_helper else NONE)
    made = night.registry.open(2).manifest.tables
    night.registry.rollback(1)
    night.recluster()
    one, other = tensors(night.folder / "second"), tensors(newest(night.output))
    assert one.keys() == other.keys()
    for name in one.keys() - {name for name in one if name.endswith("remap._extra_state")}:  # of another version
        assert torch.equal(one[name], other[name]), name
    mine = night.registry.open(3).manifest.tables
    assert {name: one.map_digest for name, one in mine.items()} == {n: one.map_digest for n, one in made.items()}


def test_what_was_clustered_and_not_trained_tells_nothing(night: Night) -> None:
    night.recluster()
    bare = by_itself(newest(night.output), night.folder / "bare")
    with pytest.raises(ConfigError, match="or was not trained since it was made or clustered"):
        CCECheckpoint.at(bare).tables(night.registry)
    for said in (NONE, ALL):
        tables = CCECheckpoint.at(bare, use_helper=said).tables(night.registry)
        assert {table.name: table.config.use_helper for table in tables} == said


def test_what_is_said_of_others(night: Night) -> None:
    said = str(read_run_config(night.run).embedding.use_helper).lower()
    with pytest.raises(ConfigError, match=f"the run's configuration says use_helper={said}; leave `use_helper` out"):
        night.recluster(use_helper=ALL)
    bare = by_itself(newest(night.run), night.folder / "bare")
    with pytest.raises(ConfigError, match=r"of \['C9'\]; the CCE tables are \['C1', 'C2'\]"):
        CCECheckpoint.at(bare, use_helper={"C9": False}).tables(night.registry)


def test_the_plan_says_it(night: Night) -> None:
    forecast = foresee(night.job)
    assert forecast.use_helper == (ALL if read_run_config(night.run).embedding.use_helper else NONE)

    def command(*options: str) -> Any:
        places = ["--registry", night.folder / "registry", "--checkpoint", night.run, "--output-checkpoint", "x"]
        return CliRunner().invoke(app, ["recluster", *map(str, places), "--dry-run", *options])

    assert f"without helper: {'none' if forecast.use_helper['C1'] else 'C1, C2'}\n" in command().stdout
    assert json.loads(command("--json").stdout)["use_helper"] == forecast.use_helper
    assert "says use_helper=" in command("--without-helper", "C1").stderr
    assert "leave --with-helper or --without-helper out" in command("--without-helper", "C1").stderr
    both = command("--without-helper", "C1", "--with-helper", "C1")
    assert both.exit_code == 2
    assert "['C1'] are named by both" in both.stderr


@pytest.mark.parametrize(
    ("states", "tells"),
    [
        ([], False),
        ([np.zeros((2, 5))], False),
        ([np.full((2, 5, 3), 0.1)], False),  # an optimizer may begin with another value than zero
        ([np.zeros((2, 5)), np.array([[0.0] * 5, [0.0] * 4 + [1e-9]])], True),
        ([np.array([[[1.0, 2.0]] * 5] * 2)], False),
    ],
)
def test_states(states: list[Any], tells: bool) -> None:
    if tells:
        assert HelperUse().of("t", lambda: states)
    else:
        with pytest.raises(ConfigError, match="table 't'"):
            HelperUse().of("t", lambda: states)
    assert HelperUse(of_tables={"t": True}).of("t", lambda: states)
    assert HelperUse(of_run=False).of("t", lambda: pytest.fail("a run need not be read")) is False
