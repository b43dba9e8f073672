"""Curves by entry and cap, and what they are compared with."""

import math

import numpy as np
import pytest

from tests.support.experiment_results import results, row
from torchrec_cce.experiments.curve import compressed, curves_of, full_table


def test_points_are_means_over_seeds_by_parameters() -> None:
    losses = [0.47, 0.46, 0.48]
    found = results(
        row("cce", cap=8000, bce=0.45),
        *(row("cce", cap=2000, seed=seed, bce=bce) for seed, bce in enumerate(losses)),
        row("cce", name="cce, wide", cap=2000, bce=0.4),
    )
    curve, wide = curves_of(found.trials)
    assert (curve.name, wide.name, wide.method) == ("cce", "cce, wide", "cce")
    assert [point.first.cap for point in curve.points] == [2000, 8000]
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
