"""These tests train."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from torchrec_cce.errors import CCEError
from torchrec_cce.sharding import watch


@pytest.fixture(autouse=True, scope="module")
def _one_thread(one_thread: None) -> None:
    """All of them take one thread."""


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done in the background is done at once, so that a run moves at the same step every time."""

    def now(function: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function())
        except CCEError as error:
            future.set_exception(error)
        return future

    monkeypatch.setattr(watch, "_in_background", now)
