"""The journal, used by several processes of which some are killed: all saw one order of its records."""

from math import inf
from pathlib import Path

import pytest

from tests.support.forks import apart
from tests.support.linearizability import Operation, histories, is_linearizable


@pytest.mark.parametrize(
    ("seconds", "kills"), [(2.0, 8), pytest.param(60.0, 200, marks=[pytest.mark.nightly, pytest.mark.timeout(600)])]
)
def test_the_journal(tmp_path: Path, seconds: float, kills: int) -> None:
    (tmp_path / "registry").mkdir()
    found = apart(
        tmp_path / "job", histories, registry=tmp_path / "registry", processes=4, seconds=seconds, seed=0, kills=kills
    )
    assert sum(each.expected is not None and each.found is not None for each in found) > 20, "steps were taken"
    assert is_linearizable(found)


def read(began: float, ended: float, found: int) -> Operation:
    return Operation(began=began, ended=ended, found=found)


def step(began: float, ended: float, expected: int, found: int | None) -> Operation:
    return Operation(began=began, ended=ended, expected=expected, found=found)


def test_the_checker_takes_what_is_right() -> None:
    assert is_linearizable([step(0, 1, 0, 1), read(0.5, 2, 1), read(0.6, 0.7, 0), step(1.5, 3, 1, 2)])
    assert is_linearizable([step(0, inf, 0, None), read(1, 2, 0), read(3, 4, 1)]), "killed, and done later"
    assert is_linearizable([step(0, inf, 0, None), read(1, 2, 0)]), "killed, and never done"


@pytest.mark.parametrize(
    "history",
    [
        [step(0, 1, 0, 1), read(2, 3, 0)],  # a read of what is past
        [step(0, 1, 0, 1), step(0.5, 2, 0, 1)],  # two are told that they have written one record
        [read(0, 1, 1), step(2, 3, 0, 1)],  # a read of what is to come
        [step(0, inf, 0, None), read(1, 2, 1), read(3, 4, 0)],  # done and undone
    ],
)
def test_the_checker_finds_what_is_wrong(history: list[Operation]) -> None:
    assert not is_linearizable(history)
