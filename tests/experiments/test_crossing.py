import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_cce.errors import ConfigError
from torchrec_cce.experiments.compression import crossing, resample


def test_a_measured_crossing_lies_between_its_neighbours() -> None:
    found = crossing({100: 0.5, 400: 0.44, 1600: 0.40}, 0.47)
    assert found.is_measured
    assert found.optimistic == found.pessimistic == pytest.approx(200)  # half way on the logarithmic axis


def test_the_smallest_size_may_do() -> None:
    assert crossing({100: 0.4, 200: 0.3}, 0.45).optimistic == 100


def test_beyond_what_was_measured_it_is_a_range() -> None:
    found = crossing({100: 0.60, 1000: 0.50, 10_000: 0.42}, 0.40)
    assert not found.is_measured
    # The line falls by 0.08 a factor of ten; the parabola by 0.08, then 0.06: it needs x with 0.07x − 0.01x² = 0.02.
    assert found.optimistic == pytest.approx(10_000 * 10**0.25)
    assert found.pessimistic == pytest.approx(10_000 * 10 ** (3.5 - math.sqrt(3.5**2 - 2)))


def test_a_curve_that_levels_off_may_never_arrive() -> None:
    found = crossing({100: 0.60, 1000: 0.50, 10_000: 0.49}, 0.40)
    assert found.optimistic == pytest.approx(10_000 * 10**9)
    assert found.pessimistic == math.inf
    assert crossing({100: 0.5, 1000: 0.5}, 0.4).optimistic == math.inf


@given(st.floats(0.1, 0.5), st.floats(0.01, 0.2), st.floats(-0.02, 0.02))
def test_optimistic_is_never_above_pessimistic(last: float, slope: float, bend: float) -> None:
    found = crossing({10: last + 2 * slope + bend, 100: last + slope, 1000: last}, last - 0.05)
    assert 1000 <= found.optimistic <= found.pessimistic


def test_the_interval_holds_the_crossing_and_narrows_with_the_spread() -> None:
    def interval(spread: float) -> tuple[float, float]:
        seeds = [-spread, 0.0, spread]
        losses = {100: [0.5 + s for s in seeds], 1000: [0.4 + s for s in seeds]}
        drawn = resample(losses, [0.45 + s for s in seeds], resamples=1000)
        low, high = np.quantile([found.optimistic for found in drawn], [0.025, 0.975], method="nearest")
        return low, high

    (low, high), (narrow_low, narrow_high) = interval(0.01), interval(0.001)
    assert low < narrow_low < 10**2.5 < narrow_high < high
    assert interval(0.0) == pytest.approx((10**2.5, 10**2.5))


@pytest.mark.parametrize("losses", [{}, {100: 0.5}, {0: 0.5, 100: 0.4}, {10: 0.5, 100: math.nan}])
def test_what_has_no_crossing(losses: dict[int, float]) -> None:
    with pytest.raises(ConfigError, match="a crossing needs two sizes above 0"):
        crossing(losses, 0.4)
