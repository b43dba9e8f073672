"""Means and deviations over seeds, curves by entry and cap, and what they are compared with."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tests.support.experiment_results import results, row, trial_result
from torchrec_cce.experiments.curve import MeanDeviation, compressed, curves_of, full_table, seed_groups


def test_points_are_means_over_seeds_by_parameters() -> None:
    losses = [0.47, 0.46, 0.48]
    found = results(
        row("cce", cap=8000, bce=0.45),
        *(row("cce", cap=2000, seed=seed, bce=bce) for seed, bce in enumerate(losses)),
        row("cce", name="cce, wide", cap=2000, bce=0.4),
    )
    curve, wide = curves_of(found.trials)
    assert (curve.name, wide.name, wide.method) == ("cce", "cce, wide", "cce")
    assert [point.first.max_parameters for point in curve.points] == [2000, 8000]
    small, large = curve.points
    assert small.test_bce.mean == pytest.approx(np.mean(losses))
    assert small.test_bce.deviation == pytest.approx(np.std(losses, ddof=1))
    assert large.test_bce.deviation == 0
    assert small.runs == ("cce-2000-0", "cce-2000-1", "cce-2000-2")
    assert (small.label, wide.points[0].label) == ("cce at 2,000", "cce, wide at 2,000")


def test_the_full_table_is_the_one_that_validation_prefers() -> None:
    found = results(
        row("full", name="diverged", validation_bce=math.nan, bce=0.1),
        row("full", name="good on test", validation_bce=0.5, bce=0.2),
        row("full", name="good", validation_bce=0.4, bce=0.45),
        row("ce_sum", cap=2000),
    )
    curves = curves_of(found.trials)
    full = full_table(curves)
    assert full is not None
    assert full.label == "good"
    assert [curve.name for curve in compressed(curves)] == ["ce_sum"]
    assert full_table(compressed(curves)) is None


def test_quantized_rows_of_full_tables_are_compared_with_full_tables() -> None:
    quantized = row("full", name="int8", bce=0.1)
    config = json.loads(quantized["config"])
    quantized["config"] = json.dumps(config | {"derive": {"run": "full", "bits": 8}})
    curves = curves_of(results(quantized, row("full", bce=0.2)).trials)
    full = full_table(curves)
    assert full is not None
    assert full.label == "full"
    assert [curve.name for curve in compressed(curves)] == ["int8"]


def test_mean_and_sample_deviation_by_method_and_cap(tmp_path: Path) -> None:
    aucs = [0.70, 0.72, 0.77]
    results = [
        trial_result(tmp_path, "full"),
        *(trial_result(tmp_path, "cce", seed=seed, test_auc=auc, test_bce=1 - auc) for seed, auc in enumerate(aucs)),
        trial_result(tmp_path, "cce", max_parameters=1600, test_auc=0.8),
    ]
    full, cce, larger = seed_groups(results)
    assert [(s.first.method, s.first.max_parameters, len(s.trials)) for s in (full, cce, larger)] == [
        ("full", None, 1),
        ("cce", 800, 3),
        ("cce", 1600, 1),
    ]
    assert cce.test_auc.mean == pytest.approx(np.mean(aucs))
    assert cce.test_auc.deviation == pytest.approx(np.std(aucs, ddof=1))
    assert cce.test_bce.mean == pytest.approx(1 - np.mean(aucs))
    assert (larger.test_auc.mean, larger.test_auc.deviation) == (0.8, 0.0)
    assert str(larger.test_auc) == "0.8000"
    assert str(MeanDeviation(mean=0.7, deviation=0.01)) == "0.7000 ± 0.0100"


def test_a_run_that_diverged_is_not_in_the_mean(tmp_path: Path) -> None:
    (group,) = seed_groups(
        [trial_result(tmp_path, "cce", seed=seed, test_auc=auc) for seed, auc in ((0, math.nan), (1, 0.7))]
    )
    assert group.test_auc == MeanDeviation(mean=0.7, deviation=0.0)
    (group,) = seed_groups([trial_result(tmp_path, "cce", test_auc=math.nan)])
    assert math.isnan(group.test_auc.mean)


def test_a_method_that_a_comparison_has_twice_goes_by_its_names(tmp_path: Path) -> None:
    results = [trial_result(tmp_path, "cce", name=name) for name in ("narrow", "wide", "narrow")]
    assert [(s.first.method, s.first.name, len(s.trials)) for s in seed_groups(results)] == [
        ("cce", "narrow", 2),
        ("cce", "wide", 1),
    ]
    assert [s.first.name for s in seed_groups([trial_result(tmp_path, "cce")])] == ["cce"]
