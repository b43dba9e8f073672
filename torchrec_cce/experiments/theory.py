"""Appendix B of the paper, computed: the dense algorithm, Lemma B.4, k-means as a factorization, and their figures."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy.integrate import quad
from scipy.sparse import csr_array
from scipy.stats import beta

from torchrec_cce.charts.chart import Chart, HeatMap, Matrix, Series
from torchrec_cce.clustering.kmeans.kmeans import kmeans
from torchrec_cce.clustering.kmeans.nearest import NearestCentroid
from torchrec_cce.errors import ConfigError, MissingExtraError
from torchrec_cce.extras import require

Array = npt.NDArray[np.float64]
Variant = Literal["noise", "smart noise", "half noise", "half smart noise"]
"""Figure 6. Smart noise is Gaussian noise that the SVD of X shapes, `V Σ⁻¹ g`; half variants only add to what was
learned, `M = [I | M′]`, as the proof of Theorem B.0 does."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LeastSquares:
    """Find `T: [d₁, d₂]` that minimises `‖XT − Y‖²` (squared Frobenius norms throughout)."""

    x: Array
    """[n, d₁], of full column rank."""
    y: Array
    """[n, d₂]."""

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or self.y.ndim != 2 or len(self.x) != len(self.y):
            raise ConfigError(f"X is {list(self.x.shape)} and Y {list(self.y.shape)}; they must be [n, d1] and [n, d2]")
        if not self.singular_values[-1] > 0:
            raise ConfigError("X has not full column rank; the algorithm's bound says nothing then")

    @cached_property
    def singular_values(self) -> Array:
        """[d₁], descending."""
        return self._svd[1]

    @cached_property
    def smart(self) -> Array:
        """[d₁, d₁] `V Σ⁻¹`: what shapes smart noise."""
        _, values, v_transposed = self._svd
        shaping: Array = v_transposed.T / values
        return shaping

    @cached_property
    def lowest_loss(self) -> float:
        """`‖XT* − Y‖²` of the best T."""
        return self.loss(self._best)

    @cached_property
    def explained(self) -> float:
        """`‖XT*‖²`: the excess loss of T = 0."""
        return _square(self.x @ self._best)

    @property
    def rho(self) -> float:
        """`σ_min² / ‖X‖²`: what one column of noise takes off the excess, at least."""
        return float(self.singular_values[-1] ** 2 / np.square(self.singular_values).sum())

    def loss(self, t: Array) -> float:
        """`‖XT − Y‖²` of `t: [d₁, d₂]`."""
        return _square(self.x @ t - self.y)

    def bound(self, num_steps: int, *, num_columns: int, smart: bool = False) -> Array:
        """[num_steps + 1]: what Theorem B.0 says of the expected loss after each step.

        Args:
            num_columns: `k`, of the sketch.
            smart: with `1/d₁` in place of ρ, which smart noise reaches.
        """
        rate = 1 / self.x.shape[1] if smart else self.rho
        powers = (num_columns - self.y.shape[1]) * np.arange(num_steps + 1)
        losses: Array = (1 - rate) ** powers * self.explained + self.lowest_loss
        return losses

    @cached_property
    def _svd(self) -> tuple[Array, Array, Array]:
        u, values, v_transposed = np.linalg.svd(self.x, full_matrices=False)
        return u, values, v_transposed

    @cached_property
    def _best(self) -> Array:
        return _solve(self.x, self.y)


def dense_cce(
    problem: LeastSquares, *, num_columns: int, num_steps: int, variant: Variant, rng: np.random.Generator
) -> Array:
    """Run the algorithm: `H = [T | G]` with fresh noise G, `M = argmin ‖XHM − Y‖`, `T = HM`, from T = 0.

    Args:
        num_columns: `k`, columns of the sketch H: more than d₂ and fewer than d₁.

    Returns:
        losses: [num_steps + 1] `‖XT − Y‖²` before the first step and after each.

    Raises:
        ConfigError: an unknown variant, or a `k` that is not between d₂ and d₁.
    """
    if variant not in get_args(Variant):
        raise ConfigError(f"variant={variant!r} is not one of {', '.join(get_args(Variant))}")
    (_, d1), (_, d2) = problem.x.shape, problem.y.shape
    if not d2 < num_columns < d1:
        raise ConfigError(f"num_columns={num_columns} is not between d2={d2} and d1={d1}")
    t: Array = np.zeros((d1, d2))
    losses = [problem.loss(t)]
    for _ in range(num_steps):
        noise = rng.standard_normal((d1, num_columns - d2))
        if variant.endswith("smart noise"):
            noise = problem.smart @ noise
        if variant.startswith("half"):
            t = t + noise @ _solve(problem.x @ noise, problem.y - problem.x @ t)
        else:
            sketch = np.hstack([t, noise])
            t = sketch @ _solve(problem.x @ sketch, problem.y)
        losses.append(problem.loss(t))
    return np.array(losses)


def low_rank_problem(
    rng: np.random.Generator, *, n: int = 1000, d1: int = 100, d2: int = 10, rank: int = 10, noise: float = 0.1
) -> LeastSquares:
    """The problems of Figure 6: X of low rank plus some noise, Y random."""
    x = rng.standard_normal((n, rank)) @ rng.standard_normal((rank, d1)) + noise * rng.standard_normal((n, d1))
    return LeastSquares(x=x, y=rng.standard_normal((n, d2)))


def _solve(a: Array, b: Array) -> Array:
    """`argmin_M ‖AM − B‖`; the shortest where there are several, as while T is still zero."""
    solution: Array = np.linalg.lstsq(a, b, rcond=None)[0].astype(np.float64, copy=False)
    return solution


def _square(matrix: Array) -> float:
    return float(np.square(matrix).sum())


Distribution = Literal["exponential", "chi square"]
_SHARES = {"exponential": beta(1, 1), "chi square": beta(0.5, 0.5)}
"""How x / (x + y) is distributed."""


def expected_ratio(p: float, distribution: Distribution) -> float:
    """`E[x / (px + (1 − p)y)]`, x and y independent, by numerical integration to about 1e-6; Figure 7.

    The lemma says that it is at least 1 for `0 ≤ p ≤ 1/2`. At p = 0 it is infinite for both distributions.

    Raises:
        ConfigError: `p` is not in (0, 1], or the distribution is unknown.
    """
    if distribution not in get_args(Distribution):
        raise ConfigError(f"distribution={distribution!r} is not one of {', '.join(get_args(Distribution))}")
    if not 0 < p <= 1:
        raise ConfigError(f"p={p} is not in (0, 1]")
    quantile = _SHARES[distribution].ppf

    def ratio(u: float) -> float:
        share = quantile(u)
        return float(share / (p * share + (1 - p) * (1 - share)))

    value, _ = quad(ratio, 0, 1, limit=200)
    return float(value)


@dataclass(frozen=True, kw_only=True, eq=False)
class Factors:
    """`T ≈ H M`."""

    sparse: csr_array
    """H: [n, k], a single 1 in each row: the cluster of that row of T."""
    dense: npt.NDArray[np.float32]
    """M: [k, d], the centroids."""

    def product(self) -> npt.NDArray[np.float32]:
        """[n, d]."""
        product: npt.NDArray[np.float32] = self.sparse @ self.dense
        return product


def factorize(matrix: npt.NDArray[np.float32], num_clusters: int, *, seed: int) -> Factors:
    """Factor `matrix: [n, d] float32` by k-means. Raises as `kmeans`."""
    centroids = kmeans(matrix, num_clusters, seed=seed)
    codes, _ = NearestCentroid(centroids)(matrix)
    ones = np.ones(len(matrix), np.float32)
    sparse = csr_array((ones, codes, np.arange(len(matrix) + 1)), shape=(len(matrix), len(centroids)))
    return Factors(sparse=sparse, dense=centroids)


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
    steps = tuple(float(step) for step in range(num_steps + 1))
    series = []
    with _one_thread():
        problems = [_rotated(low_rank_problem(rng)) for _ in range(repetitions)]

        def excess(losses: Sequence[Array]) -> Array:
            """[repetitions, num_steps + 1], of the losses for each problem."""
            return np.array([(of_p - p.lowest_loss) / p.explained for of_p, p in zip(losses, problems, strict=True)])

        for variant in get_args(Variant):
            runs = [
                dense_cce(p, num_columns=num_columns, num_steps=num_steps, variant=variant, rng=rng) for p in problems
            ]
            series.append(Series(label=variant, x=steps, y=tuple(excess(runs).clip(min=1e-16).mean(axis=0).tolist())))
        for at, label, smart in ((1, "bound, noise", False), (3, "bound, smart noise", True)):
            bounds = excess([p.bound(num_steps, num_columns=num_columns, smart=smart) for p in problems])
            series.insert(at, Series(label=label, x=steps, y=tuple(bounds.mean(axis=0).tolist()), style="bound"))
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
