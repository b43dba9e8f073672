"""Means and deviations over seeds."""

import math
from pathlib import Path

import numpy as np
import pytest

from tests.support.outcomes import outcome
from torchrec_cce.experiments.outcome import Spread, summarise


def test_mean_and_sample_deviation_by_method_and_cap(tmp_path: Path) -> None:
    aucs = [0.70, 0.72, 0.77]
    outcomes = [
        outcome(tmp_path, "full"),
        *(outcome(tmp_path, "cce", seed=seed, auc=auc, bce=1 - auc) for seed, auc in enumerate(aucs)),
        outcome(tmp_path, "cce", max_parameters=1600, auc=0.8),
    ]
    full, cce, larger = summarise(outcomes)
    assert [(s.method, s.max_parameters, s.seeds) for s in (full, cce, larger)] == [
        ("full", None, 1),
        ("cce", 800, 3),
        ("cce", 1600, 1),
    ]
    assert cce.auc.mean == pytest.approx(np.mean(aucs))
    assert cce.auc.deviation == pytest.approx(np.std(aucs, ddof=1))
    assert cce.bce.mean == pytest.approx(1 - np.mean(aucs))
    assert (larger.auc.mean, larger.auc.deviation) == (0.8, 0.0)
    assert str(larger.auc) == "0.8000"
    assert str(Spread(mean=0.7, deviation=0.01)) == "0.7000 ± 0.0100"


def test_a_run_that_diverged_is_not_in_the_mean(tmp_path: Path) -> None:
    (summary,) = summarise([outcome(tmp_path, "cce", seed=seed, auc=auc) for seed, auc in ((0, math.nan), (1, 0.7))])
    assert summary.auc == Spread(mean=0.7, deviation=0.0)
    (summary,) = summarise([outcome(tmp_path, "cce", auc=math.nan)])
    assert math.isnan(summary.auc.mean)


def test_a_method_that_a_comparison_has_twice_goes_by_its_names(tmp_path: Path) -> None:
    outcomes = [outcome(tmp_path, "cce", name=name) for name in ("narrow", "wide", "narrow")]
    assert [(s.method, s.name, s.seeds) for s in summarise(outcomes)] == [("cce", "narrow", 2), ("cce", "wide", 1)]
    assert [s.name for s in summarise([outcome(tmp_path, "cce")])] == ["cce"]
