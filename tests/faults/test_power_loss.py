"""Power cuts at any moment of a publish and of a checkpoint: what was done is there, and all that is there is whole."""

from pathlib import Path

import pytest

from tests.support import scenes
from tests.support.failing_calls import Scene
from tests.support.power_loss import Recorder, cut_at_every_call

NIGHTLY = [pytest.mark.nightly, pytest.mark.timeout(1800)]
DEPTHS = pytest.mark.parametrize(("tries", "step"), [(1, 7), pytest.param(5, 1, marks=NIGHTLY)])


def assert_survives(scene: Scene, scratch: Path, tries: int, step: int) -> None:
    scratch.mkdir()
    looked, wrong = cut_at_every_call(scene, scratch, tries=tries, seed=0, step=step)
    assert wrong == []
    assert looked > 30


@DEPTHS
@pytest.mark.parametrize("first", [False, True])
def test_publishing(tmp_path: Path, first: bool, tries: int, step: int) -> None:
    assert_survives(scenes.publishing(tmp_path / "scene", first=first), tmp_path / "scratch", tries, step)


@DEPTHS
def test_checkpoints(tmp_path: Path, trained: Path, tries: int, step: int) -> None:
    with scenes.saving(tmp_path / "scene", trained) as scene:
        assert_survives(scene, tmp_path / "scratch", tries, 28 * step)


def write_without_fsync(folder: Path) -> None:
    (folder / "new").write_text("content")
    (folder / "new").rename(folder / "file")


def test_the_model_itself(tmp_path: Path) -> None:
    """A rename without fsync may leave the old file, the new one, and one that is empty or torn; never none."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "file").write_text("old")
    recorder = Recorder(root)
    with recorder.recording():
        write_without_fsync(root)
    recorder.close()
    found = set()
    for number, disk in enumerate(recorder.cuts[-1].disks(1000, 0)):
        disk.write(tmp_path / f"{number}")
        (name,) = (path.name for path in (tmp_path / f"{number}").iterdir())
        assert name == "file"
        found.add((tmp_path / f"{number}" / "file").read_text())
    assert {"old", "", "content", "con", "con\0\0\0\0"} <= found
