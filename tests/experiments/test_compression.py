"""Compression at the quality of full tables, against curves whose crossings are worked out by hand."""

import math

import numpy as np
import pytest

from tests.support.experiment_results import DIM, FULL_PARAMETERS, TABLES, results, row
from torchrec_cce.experiments.compression import Compression, SizeLine, compression
from torchrec_cce.experiments.curve import curves_of, full_table

SMALL = TABLES["day"] * DIM
"""Parameters of the table that stays full."""


def found(losses: dict[int, list[float]], baseline: list[float], method: str = "ce_concat") -> Compression:
    """Of losses by cap."""
    rows = [row("full", seed=seed, bce=bce) for seed, bce in enumerate(baseline)]
    rows += [
        row(method, cap=cap, seed=seed, bce=bce) for cap, values in losses.items() for seed, bce in enumerate(values)
    ]
    full, curve = curves_of(results(*rows).trials)
    point = full_table([full])
    assert point is not None
    return compression(curve, point)


def test_a_measured_crossing_in_three_factors_and_bytes() -> None:
    entry = found({8000: [0.48], 16_000: [0.46], 32_000: [0.44]}, [0.47], "cce")
    at = math.sqrt((8000 + SMALL) * (16_000 + SMALL))  # half way between the first two, on a logarithmic axis
    assert entry.state == "measured"
    assert entry.found is not None
    assert entry.found.parameters.optimistic == entry.found.parameters.pessimistic == pytest.approx(at)
    assert entry.found.parameter_factor.optimistic == pytest.approx(FULL_PARAMETERS / at)
    assert entry.found.largest_factor.optimistic == pytest.approx(100_000 * DIM / (at - SMALL))
    host = 100_000 * 4 * 2  # k is 250 at the smaller cap and 500 at the larger: 16 bits from there on
    assert entry.found.host_bytes.optimistic == host
    assert entry.found.accelerator_bytes.optimistic == pytest.approx(4 * at)
    assert entry.found.byte_factor.optimistic == pytest.approx(4 * FULL_PARAMETERS / (4 * at + host))
    assert entry.runs == ("cce-8000-0", "cce-16000-0", "cce-32000-0")
    assert entry.full_runs == ("full-None-0",)


def test_pointers_beside_the_tables_are_the_accelerators() -> None:
    entry = found({8000: [0.48], 16_000: [0.46]}, [0.46], "rq")
    assert entry.found is not None
    assert entry.found.host_bytes.optimistic == 0
    assert entry.found.accelerator_bytes.optimistic == pytest.approx(4 * (16_000 + SMALL) + 100_000 * 2 * 4)


def test_beyond_the_largest_cap_it_is_a_range_from_parabola_to_line() -> None:
    caps = [1000 - SMALL, 10_000 - SMALL, 100_000 - SMALL]
    entry = found(dict(zip(caps, ([0.60], [0.50], [0.42]), strict=True)), [0.40])
    assert entry.state == "extrapolated"
    assert entry.found is not None
    factor, sizes = entry.found.parameter_factor, entry.found.parameters
    # As in test_crossing: the line needs a quarter of a decade more, the parabola 3.5 − √10.25 of entry.
    assert factor.optimistic == pytest.approx(FULL_PARAMETERS / (100_000 * 10**0.25))
    assert factor.pessimistic == pytest.approx(FULL_PARAMETERS / (100_000 * 10 ** (3.5 - math.sqrt(10.25))))
    assert sizes.optimistic < sizes.pessimistic
    assert factor.worst is None
    assert factor.best is None


def test_a_parabola_that_turns_is_a_factor_of_zero() -> None:
    entry = found({1000: [0.60], 10_000: [0.50], 100_000: [0.49]}, [0.48])
    assert entry.state == "extrapolated"
    assert entry.found is not None
    assert entry.found.byte_factor.pessimistic == entry.found.largest_factor.pessimistic == 0
    assert entry.found.accelerator_bytes.pessimistic == math.inf
    assert entry.found.parameter_factor.optimistic > 0


@pytest.mark.parametrize(
    ("losses", "state"),
    [
        ({1000: [0.4], 10_000: [0.3]}, "smallest cap"),
        ({1000: [0.4]}, "smallest cap"),
        ({1000: [0.5]}, "one cap"),
        ({1000: [0.5], 10_000: [0.5]}, "never"),
        ({1000: [0.5], 10_000: [0.6]}, "never"),
    ],
)
def test_states(losses: dict[int, list[float]], state: str) -> None:
    entry = found(losses, [0.45])
    assert entry.state == state
    assert (entry.found is None) == (state == "one cap")
    if entry.found is not None:
        factor = entry.found.largest_factor
        assert factor.optimistic == factor.pessimistic == (0 if state == "never" else pytest.approx(1600))


def test_the_interval_over_seeds_holds_the_range_and_narrows_with_the_spread() -> None:
    def interval(spread: float) -> tuple[float, float]:
        seeds = [-spread, 0.0, spread]
        losses = {cap: [bce + s for s in seeds] for cap, bce in ((1000, 0.60), (10_000, 0.50), (100_000, 0.42))}
        entry = found(losses, [0.40 + s for s in seeds])
        assert entry.found is not None
        factor = entry.found.parameter_factor
        assert factor.worst is not None
        assert factor.best is not None
        assert factor.worst <= factor.pessimistic < factor.optimistic <= factor.best
        return factor.worst, factor.best

    (wide_low, wide_high), (low, high) = interval(0.01), interval(0.001)
    assert wide_low < low
    assert high < wide_high


def test_sizes_between_and_beyond_caps() -> None:
    (curve,) = curves_of(results(*(row("cce", cap=cap) for cap in (8000, 16_000, 64_000))).trials)
    line = SizeLine(curve.points)
    for cap, width in ((8000, 1), (9000, 2), (16_000, 2), (200_000, 2)):
        assert line.largest_parameters(cap + SMALL) == pytest.approx(cap)
        assert line.host_bytes(cap + SMALL) == 400_000 * width
        assert line.accelerator_bytes(cap + SMALL) == pytest.approx(4 * (cap + SMALL))
        assert line.total_bytes(cap + SMALL) == pytest.approx(4 * (cap + SMALL) + 400_000 * width)
    assert line.host_bytes((8000 + SMALL) * (1 + 1e-12)) == 400_000  # the logarithm of a crossing at a cap, and back
    assert line.total_bytes(math.inf) == math.inf
    alone = SizeLine(curve.points[:1])
    assert alone.accelerator_bytes(2 * (8000 + SMALL)) == pytest.approx(8 * (8000 + SMALL))
    assert np.isinf(alone.largest_parameters(math.inf))


def test_a_curve_that_does_not_fall_may_do_so_for_other_seeds() -> None:
    entry = found({1000: [0.45, 0.47], 10_000: [0.46, 0.46]}, [0.455])
    assert entry.state == "never"
    assert entry.found is not None
    factor = entry.found.parameter_factor
    assert (factor.pessimistic, factor.optimistic, factor.worst) == (0, 0, 0)
    assert factor.best == pytest.approx(FULL_PARAMETERS / (1000 + SMALL))
