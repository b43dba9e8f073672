"""Others publish meanwhile, or make the same output: each job ends as one of them alone, or says why not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import nights
from tests.support.nights import Night, assert_same_tensors, at_the_moment, newest
from torchrec_cce.errors import JobError, MapMismatchError, PublishConflictError
from torchrec_cce.files.lock import held_folder
from torchrec_cce.jobs.checkpoint.reader import CCECheckpoint
from torchrec_cce.jobs.recluster.job import recluster
from torchrec_cce.jobs.recluster.summary import RECORD
from torchrec_cce.maps.registry import Registry
from torchrec_cce.training.versions import snapshot_of_run


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nights.train_a_run(tmp_path_factory.mktemp("other"), seed=1)


def once(deed: Callable[[], object]) -> Callable[[], object]:
    """The deed, and then nothing."""
    deeds = iter([deed])
    return lambda: next(deeds, lambda: None)()


def test_another_publishes_meanwhile(night: Night, other_model: Path) -> None:
    theirs = snapshot_of_run(other_model).tables
    with (
        at_the_moment("write_summary", once(lambda: night.registry.publish(theirs))),
        pytest.raises(PublishConflictError, match="current is version 2"),
    ):
        night.recluster()
    assert night.versions == [1, 2]
    assert not night.output.exists()
    assert not list(night.folder.glob(".*"))
    # And once it is known beforehand, nothing is clustered.
    with at_the_moment("cluster", lambda: pytest.fail("clustered")), pytest.raises(PublishConflictError) as raised:
        night.recluster()
    assert "was trained with version 1 " in str(raised.value)
    assert "but current is version 2 " in str(raised.value)


def test_a_number_that_another_took(night: Night, other_model: Path) -> None:
    """Published and rolled back: the version that the weights name is the one that there is."""

    def deed() -> None:
        night.registry.publish(snapshot_of_run(other_model).tables)
        night.registry.rollback(1)

    with at_the_moment("write_summary", once(deed)):
        summary = night.recluster().summary
    assert summary.version == 3
    assert json.loads((night.output / RECORD).read_text())["version"] == 3
    (stamps,) = CCECheckpoint.at(night.output).stamps.values()
    assert {stamp.version for stamp in stamps} == {3}
    assert night.registry.state().current == 3


def test_two_jobs_for_one_output(night: Night) -> None:
    with held_folder(night.output), pytest.raises(JobError, match="another process makes "):
        night.recluster()
    night.assert_untouched()

    def another() -> None:
        with pytest.raises(JobError, match="another process makes "):
            recluster(night.job)

    with at_the_moment("cluster", another):
        assert night.recluster().summary.version == 2


def test_two_jobs_for_two_outputs(night: Night) -> None:
    """The second to publish is told; run again, it takes over what the first has published."""
    second = night.folder / "second"
    with (
        at_the_moment("write_summary", once(lambda: night.recluster(output=second))),
        pytest.raises(PublishConflictError, match="current is version 2"),
    ):
        night.recluster()
    assert not night.output.exists()
    assert night.recluster().summary.status == "finished"
    assert night.versions == [1, 2]
    assert_same_tensors(newest(night.output), newest(second))


def test_another_model(night: Night, other_model: Path, tmp_path: Path) -> None:
    with pytest.raises(PublishConflictError, match="was trained with maps that are no version of it"):
        night.recluster(checkpoint=other_model)
    stranger = Registry(tmp_path / "stranger")
    tables = snapshot_of_run(other_model).tables
    stranger.publish({"C1": tables["C1"]})
    with pytest.raises(
        MapMismatchError, match=r"has CCE tables \['C1', 'C2'\], .* \['C1'\]; it is the registry of another"
    ):
        night.recluster(registry=str(tmp_path / "stranger"))
    assert not night.output.exists()
