"""Figures 5 to 7 say what the paper's do."""

import numpy as np
import pytest

from torchrec_cce.experiments.theory import (
    _rotated,
    convergence_chart,
    expectation_chart,
    factorization_map,
    low_rank_problem,
)


def test_excess_losses_lie_below_their_bounds_in_the_papers_order() -> None:
    chart = convergence_chart()
    by_label = {series.label: np.array(series.y) for series in chart.series}
    for variant in ("noise", "half noise"):
        assert (by_label[variant] <= by_label["bound, noise"] * 1.001).all()
    for variant in ("smart noise", "half smart noise"):
        assert (by_label[variant] <= by_label["bound, smart noise"] * 1.02).all()
    assert all(values[0] == pytest.approx(1) for values in by_label.values())
    ends = {label: values[-1] for label, values in by_label.items()}
    assert ends["smart noise"] < ends["half smart noise"] < ends["noise"] < ends["half noise"]


def test_a_rotated_problem_is_the_same_problem() -> None:
    rng = np.random.default_rng(0)
    problem = low_rank_problem(rng, n=60, d1=12, d2=3)
    rotated = _rotated(problem)
    t = rng.standard_normal((12, 3))
    assert rotated.loss(t) - rotated.lowest_loss == pytest.approx(problem.loss(t) - problem.lowest_loss)
    assert rotated.explained == pytest.approx(problem.explained)
    assert rotated.rho == pytest.approx(problem.rho)


def test_expectations_are_at_least_one_up_to_a_half() -> None:
    *curves, level = expectation_chart().series
    assert level.y == (1.0,)
    for series in curves:
        for p, value in zip(series.x, series.y, strict=True):
            assert (value >= 1 - 1e-4) == (p <= 0.5) or p == 1
            assert value < 6


def test_factors_multiply_to_nearly_the_table() -> None:
    picture = factorization_map()
    table, tall, dense, product = (np.array(matrix.values) for matrix in picture.matrices)
    np.testing.assert_allclose(tall @ dense, product, atol=1e-6)
    assert (tall.sum(axis=1) == 1).all()
    assert np.square(table - product).sum() < 0.1 * np.square(table - table.mean(axis=0)).sum()
