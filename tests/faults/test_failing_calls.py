"""Every call on a file or a store fails in its turn: the old state or the new one is there; the next try succeeds."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import scenes
from tests.support.failing_calls import Scene, calls_of, some_of, sweep

TRIES = 25
"""Of each kind. The nightly tests, and `make bench-trust`, fail every call."""


def assert_survives(scene: Scene, scratch: Path, *, every: bool) -> None:
    numbers = None if every else some_of(calls_of(scene, scratch), TRIES)
    found = sweep(scene, scratch, numbers=numbers)
    assert found.violations == []
    assert found.tries >= 15
    assert found.failed, "calls that matter were failed; gc can do without most of its own"


ALL = pytest.mark.parametrize(
    "every", [False, pytest.param(True, marks=[pytest.mark.nightly, pytest.mark.timeout(1800)])]
)


@ALL
@pytest.mark.parametrize("make", [scenes.publishing, scenes.collecting, scenes.remapping])
def test_stores(tmp_path: Path, make: Callable[[Path], Scene], every: bool) -> None:
    (tmp_path / "scratch").mkdir()
    assert_survives(make(tmp_path / "scene"), tmp_path / "scratch", every=every)


@ALL
def test_checkpoints(tmp_path: Path, trained: Path, every: bool) -> None:
    (tmp_path / "scratch").mkdir()
    with scenes.saving(tmp_path / "scene", trained) as scene:
        assert_survives(scene, tmp_path / "scratch", every=every)


@ALL
def test_reclustering(tmp_path: Path, trained: Path, every: bool) -> None:
    (tmp_path / "scratch").mkdir()
    assert_survives(scenes.reclustering(tmp_path / "scene", trained), tmp_path / "scratch", every=every)
