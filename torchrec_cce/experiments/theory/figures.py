"""Figures 5, 6 and 7 of the paper, computed anew."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, get_args

import numpy as np

from torchrec_cce.charts.chart import Chart, HeatMap, Matrix, Series
from torchrec_cce.errors import MissingExtraError
from torchrec_cce.experiments.theory.dense import LeastSquares, Variant, dense_cce, low_rank_problem
from torchrec_cce.experiments.theory.expectation import Distribution, expected_ratio
from torchrec_cce.experiments.theory.factorization import factorize
from torchrec_cce.extras import require


@cache
def factorization_map(*, seed: int = 0) -> HeatMap:
    """Figure 5: 24 rows of 6 near 4 centres, and what k-means makes of them."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((4, 6))
    table = (centres[rng.integers(4, size=24)] + 0.15 * rng.standard_normal((24, 6))).astype(np.float32)
    factors = factorize(table, 4, seed=seed)
    product = factors.product()
    error = float(np.square(table - product).sum() / np.square(table - table.mean(axis=0)).sum())
    return HeatMap(
        name="figure-5",
        caption=f"Figure 5: k-means factors T into a tall sparse H, a single 1 in each row, and a small dense M; "
        f"{error:.1%} of the variance of T is left",
        matrices=(
            Matrix(title="T [24, 6]", values=_rows(table)),
            Matrix(title="H [24, 4]", values=_rows(factors.sparse.toarray())),
            Matrix(title="M [4, 6]", values=_rows(factors.dense)),
            Matrix(title="H M", values=_rows(product)),
        ),
    )


@cache
def convergence_chart(*, repetitions: int = 40, num_steps: int = 20, num_columns: int = 20, seed: int = 0) -> Chart:
    """Figure 6: the excess loss of the dense algorithm with each kind of noise, as a share of that of T = 0."""
    rng = np.random.default_rng(seed)
    with _one_thread():
        return _convergence(rng, repetitions=repetitions, num_steps=num_steps, num_columns=num_columns)


def _convergence(rng: np.random.Generator, *, repetitions: int, num_steps: int, num_columns: int) -> Chart:
    problems = [_rotated(low_rank_problem(rng)) for _ in range(repetitions)]
    steps = tuple(float(step) for step in range(num_steps + 1))
    series = []
    for variant in get_args(Variant):
        runs = [
            dense_cce(problem, num_columns=num_columns, num_steps=num_steps, variant=variant, rng=rng)
            for problem in problems
        ]
        shares = np.array(
            [(losses - p.lowest_loss) / p.explained for losses, p in zip(runs, problems, strict=True)]
        ).clip(min=1e-16)
        series.append(Series(label=variant, x=steps, y=tuple(shares.mean(axis=0).tolist())))
    for label, smart in (("bound, noise", False), ("bound, smart noise", True)):
        shares = np.array(
            [(p.bound(num_steps, num_columns=num_columns, smart=smart) - p.lowest_loss) / p.explained for p in problems]
        )
        at = 2 if smart else 1
        series.insert(at + smart, Series(label=label, x=steps, y=tuple(shares.mean(axis=0).tolist()), style="bound"))
    return Chart(
        name="figure-6",
        caption=f"Figure 6: the dense CCE algorithm on X of rank 10 with little noise, [1000, 100], Y [1000, 10], "
        f"k = {num_columns}: excess loss over that of T = 0, mean of {repetitions} repetitions. Dashed: the bounds "
        f"(1 − ρ)^(i(k − d₂)) of Theorem B.0 and (1 − 1/d₁)^(i(k − d₂)) for smart noise",
        x_label="iterations",
        y_label="excess loss, share",
        series=tuple(series),
        log_y=True,
        whole_x=True,
    )


@cache
def expectation_chart(*, num_points: int = 40) -> Chart:
    """Figure 7: Lemma B.4 for two distributions."""
    places = tuple(np.linspace(0.025, 1, num_points).tolist())
    series = [
        Series(label=distribution, x=places, y=tuple(expected_ratio(p, distribution) for p in places))
        for distribution in get_args(Distribution)
    ]
    return Chart(
        name="figure-7",
        caption="Figure 7: E[x / (px + (1 − p)y)] of independent x and y; at least 1 for p ≤ 1/2, as Lemma B.4 says",
        x_label="p",
        y_label="expectation",
        series=(*series, Series(label="1", y=(1.0,), style="level")),
    )


def _one_thread() -> AbstractContextManager[object]:
    """Of BLAS, if scikit-learn's way to say so is installed: for matrices this small a second one is in the way."""
    try:
        threadpoolctl: Any = require("threadpoolctl", "sklearn")
    except MissingExtraError:
        return nullcontext()
    limits: AbstractContextManager[object] = threadpoolctl.threadpool_limits(1)
    return limits


def _rotated(problem: LeastSquares) -> LeastSquares:
    """The same problem in d₁ rows in place of n: with X = QR, `‖XT − Y‖² = ‖RT − QᵀY‖²` and what no T changes."""
    q, r = np.linalg.qr(problem.x)
    return LeastSquares(x=r, y=q.T @ problem.y)


def _rows(matrix: object) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in np.asarray(matrix, np.float64).tolist())
