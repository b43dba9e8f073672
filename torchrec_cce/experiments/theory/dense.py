"""The dense CCE algorithm of Appendix B: least squares in little memory, by sketches that keep what was learned."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from torchrec_cce.errors import ConfigError

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
