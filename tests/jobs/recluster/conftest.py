"""What these tests cluster."""

from pathlib import Path

import pytest

from tests.support.nights import EASY, Night


@pytest.fixture
def night(trained: Path, tmp_path: Path) -> Night:
    return Night(tmp_path, trained, thresholds=EASY)
