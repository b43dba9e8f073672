"""The plans that are measured, and the command where there are no logs."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import systems
from benchmarks.logs import DATA, LOGS, PLANS
from benchmarks.reduced import reduced
from torchrec_cce.experiments.agenda import Agenda
from torchrec_cce.experiments.plan import Plan, read_plan
from torchrec_cce.methods.registry import METHODS

FILES = sorted(PLANS.glob("*.toml"))


def read(path: Path) -> Plan:
    """With a log of two features, which is not there."""
    splits = {split: {"path": f"{split}.parquet"} for split in ("train", "validation", "test")}
    sections: dict[str, Any] = {
        "data": {"format": "parquet", **splits},
        "tables": {"user": 35_000, "item": 30_000},
    }
    return read_plan(path, sections=sections)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_plans_are_valid_and_every_method_fits_under_its_caps(path: Path) -> None:
    plan = read(path)
    for entry in plan.methods:
        for max_parameters in plan.caps_of(entry):
            plan.configure(entry, max_parameters=max_parameters, seed=0, learning_rate=0.1, source=Path("runs/source"))


def test_every_method_is_measured() -> None:
    assert {entry.method for entry in read(PLANS / "criteo_80k.toml").methods} == set(METHODS)


def test_a_reduced_plan_has_one_run_of_each_entry(tmp_path: Path) -> None:
    whole = read(PLANS / "criteo_80k.toml")
    small = reduced(whole)
    assert [entry.name for entry in small.methods] == [entry.name for entry in whole.methods]
    larger_sources = 1  # "cce, more parameters before" needs another cap of what it starts from
    assert Agenda(small, tmp_path).total == len(whole.methods) + larger_sources
    assert small.learning_rates[0] in whole.learning_rates
    assert small.caps == (8000,)


def test_without_the_log_it_says_so_and_succeeds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not LOGS["criteo_80k"].is_made
    monkeypatch.delenv(DATA, raising=False)
    monkeypatch.setattr("sys.argv", ["systems"])
    systems.main()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"criteo_80k is skipped: {DATA} does not name the folder that holds it\n"
