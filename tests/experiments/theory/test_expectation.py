import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_cce.errors import ConfigError
from torchrec_cce.experiments.theory import Distribution, expected_ratio


@pytest.mark.parametrize("distribution", ["exponential", "chi square"])
def test_at_least_one_up_to_a_half_and_one_there(distribution: Distribution) -> None:
    values = [expected_ratio(p, distribution) for p in (0.1, 0.25, 0.5, 0.75, 1.0)]
    assert values[0] > values[1] > 1
    assert values[2] == pytest.approx(1, abs=1e-4)  # x/(x/2 + y/2) and its mirror image add up to 2
    assert values[3] < 1
    assert values[4] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("distribution", ["exponential", "chi square"])
def test_against_draws(distribution: Distribution) -> None:
    rng = np.random.default_rng(0)
    draws = rng.exponential(size=(200_000, 2)) if distribution == "exponential" else rng.chisquare(1, (200_000, 2))
    ratios = draws[:, -1] / (draws @ [0.7, 0.3])
    assert expected_ratio(0.3, distribution) == pytest.approx(ratios.mean(), abs=4 * ratios.std() / 200_000**0.5)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32), n=st.integers(2, 6))
def test_lemma_for_any_weights(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    weights = np.sort(rng.dirichlet(np.ones(n)))[::-1]  # the last is the smallest, at most 1/n
    draws = rng.chisquare(1, (20_000, n))
    ratios = draws[:, -1] / (draws @ weights)
    assert ratios.mean() >= 1 - 4 * ratios.std() / np.sqrt(len(ratios))


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"p=0 is not in \(0, 1\]"):
        expected_ratio(0, "exponential")
    with pytest.raises(ConfigError, match="distribution='normal' is not one of exponential, chi square"):
        expected_ratio(0.5, "normal")  # type: ignore[arg-type]
