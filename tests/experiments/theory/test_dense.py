import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_cce.errors import ConfigError
from torchrec_cce.experiments.theory import LeastSquares, Variant, dense_cce, low_rank_problem

VARIANTS: tuple[Variant, ...] = ("noise", "smart noise", "half noise", "half smart noise")


def random_problem(seed: int, *, d1: int, d2: int) -> LeastSquares:
    """Columns of X of very different lengths, so that ρ is far below 1/d₁."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3 * d1, d1)) * rng.uniform(0.3, 3, d1)
    return LeastSquares(x=x, y=x @ rng.standard_normal((d1, d2)) + rng.standard_normal((3 * d1, d2)))


def losses(problem: LeastSquares, variant: Variant, *, num_columns: int, repetitions: int, seed: int) -> np.ndarray:
    """[repetitions, 9]."""
    rng = np.random.default_rng(seed)
    runs = [
        dense_cce(problem, num_columns=num_columns, num_steps=8, variant=variant, rng=rng) for _ in range(repetitions)
    ]
    return np.stack(runs)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32), d2=st.integers(1, 3), extra=st.integers(1, 4), variant=st.sampled_from(VARIANTS))
def test_mean_loss_is_below_the_bound(seed: int, d2: int, extra: int, variant: Variant) -> None:
    """Theorem B.0, and for smart noise the better rate; within four standard errors of the mean."""
    problem = random_problem(seed, d1=d2 + extra + 4, d2=d2)
    k = d2 + extra
    found = losses(problem, variant, num_columns=k, repetitions=60, seed=seed)
    error = found.std(axis=0) / np.sqrt(len(found))
    bound = problem.bound(8, num_columns=k, smart="smart" in variant)
    assert (found.mean(axis=0) <= bound + 4 * error + 1e-9).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_never_rises_and_never_goes_below_the_optimum(variant: Variant) -> None:
    problem = random_problem(0, d1=12, d2=2)
    found = losses(problem, variant, num_columns=5, repetitions=5, seed=0)
    assert (np.diff(found, axis=1) <= 1e-9).all()
    assert (found >= problem.lowest_loss - 1e-9).all()
    assert found[:, 0] == pytest.approx(problem.explained + problem.lowest_loss)


def test_bound_by_hand() -> None:
    problem = LeastSquares(x=np.array([[3.0, 0], [0, 1], [0, 0]]), y=np.array([[3.0], [2], [5]]))
    assert (problem.lowest_loss, problem.explained, problem.rho) == pytest.approx((25, 13, 0.1))
    np.testing.assert_allclose(problem.bound(2, num_columns=3), 25 + 13 * 0.9 ** np.array([0, 2, 4]))
    np.testing.assert_allclose(problem.bound(1, num_columns=3, smart=True), [38, 25 + 13 / 4])


def test_smart_noise_converges_faster_and_halves_lose_a_little() -> None:
    """Figure 6, on its problems."""
    problem = low_rank_problem(np.random.default_rng(0), n=300, d1=40, d2=4)
    excess = {
        variant: losses(problem, variant, num_columns=10, repetitions=10, seed=1).mean(axis=0)[-1] - problem.lowest_loss
        for variant in VARIANTS
    }
    assert excess["smart noise"] < excess["noise"] < excess["half noise"]
    assert excess["smart noise"] <= excess["half smart noise"] < excess["half noise"]


@pytest.mark.parametrize("k", [2, 12, 13])
def test_sketches_that_cannot_be(k: int) -> None:
    problem = random_problem(0, d1=12, d2=2)
    with pytest.raises(ConfigError, match=rf"num_columns={k} is not between d2=2 and d1=12"):
        dense_cce(problem, num_columns=k, num_steps=1, variant="noise", rng=np.random.default_rng(0))


def test_problems_and_variants_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"X is \[3, 2\] and Y \[4, 1\]"):
        LeastSquares(x=np.ones((3, 2)), y=np.ones((4, 1)))
    with pytest.raises(ConfigError, match="full column rank"):
        LeastSquares(x=np.zeros((3, 2)), y=np.ones((3, 1)))
    with pytest.raises(ConfigError, match="variant='loud' is not one of noise, smart noise"):
        dense_cce(
            random_problem(0, d1=5, d2=1),
            num_columns=3,
            num_steps=1,
            variant="loud",  # type: ignore[arg-type]
            rng=np.random.default_rng(0),
        )
