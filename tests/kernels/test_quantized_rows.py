"""Rows of int8 and float16 numbers: sums and updates against plain loops, and rounding that is right on average."""

import numpy as np
import pytest

from torchrec_cce.kernels.quantized_rows import pool_rows, train_rows

M, D, B = 20, 6, 9
RATE = 0.1
FORMATS = ("int8", "float16")
STEPS = {"int8": np.float32(0.03), "float16": np.float32(1)}
FLOAT32_ERRORS = {"int8": 1e-4, "float16": 2e-3}
"""Of sums that are rounded afterwards, as parts of a rounding."""
LARGEST = {"int8": 127.0, "float16": 65504.0}


def case(numbers: str, *, weighted: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 5, B).astype(np.int32)
    slots = rng.integers(0, M, lengths.sum())
    weights = rng.random(len(slots)).astype(np.float32) if weighted else np.empty(0, np.float32)
    rows = rng.integers(-127, 128, (M, D)).astype(np.int8)
    if numbers == "float16":  # from such that are multiples of the smallest number to such that are large
        rows = (rng.normal(size=(M, D)) * 2.0 ** rng.integers(-18, 5, (M, D))).astype(np.float16)
    return {"rows": rows, "slots": slots, "lengths": lengths, "weights": weights}


def stored(rows: np.ndarray) -> np.ndarray:
    return rows.view(np.uint16) if rows.dtype == np.float16 else rows


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("numbers", FORMATS)
def test_sums_of_bags(numbers: str, weighted: bool) -> None:
    at = case(numbers, weighted=weighted)
    out = np.zeros((B, D), np.float32)
    pool_rows(stored(at["rows"]), STEPS[numbers], at["slots"], at["lengths"], at["weights"], out)

    weights = at["weights"] if weighted else np.ones(len(at["slots"]))
    each = weights[:, None] * at["rows"][at["slots"]].astype(np.float64) * STEPS[numbers]
    bags = np.arange(B).repeat(at["lengths"])
    expected = np.stack([each[bags == bag].sum(axis=0) for bag in range(B)])
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_every_float16_number_is_read_as_what_it_is() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).reshape(-1, 16)
    out = np.zeros(every.shape, np.float32)
    one_by_one = np.ones(len(every), np.int64)
    pool_rows(every, np.float32(1), np.arange(len(every)), one_by_one, np.empty(0, np.float32), out)
    expected = every.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(out, np.where(np.isfinite(expected), expected, np.nan))


def trained(
    numbers: str,
    at: dict[str, np.ndarray],
    gradients: np.ndarray,
    state: np.ndarray,
    *,
    rate: float = RATE,
    decay: float,
    seed: int,
) -> np.ndarray:
    """The rows as float64, in steps."""
    rows = at["rows"].copy()
    train_rows(
        stored(rows),
        state,
        STEPS[numbers],
        np.argsort(at["slots"], kind="stable"),
        at["slots"],
        np.arange(len(at["lengths"])).repeat(at["lengths"]),
        at["weights"],
        gradients,
        np.float32(rate),
        np.float32(decay),
        np.float32(1e-8),
        np.uint64(seed),
    )
    return rows.astype(np.float64)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("numbers", FORMATS)
def test_an_update_is_row_wise_adagrad_up_to_a_rounding_and_on_average_exactly(
    numbers: str, weighted: bool, decay: float
) -> None:
    at, rng = case(numbers, weighted=weighted), np.random.default_rng(1)
    gradients = rng.normal(size=(B, D)).astype(np.float32)
    before = rng.random(M).astype(np.float32)

    weights = at["weights"] if weighted else np.ones(len(at["slots"]))
    total = np.zeros((M, D))
    np.add.at(total, at["slots"], weights[:, None] * gradients[np.arange(B).repeat(at["lengths"])])
    touched = np.isin(np.arange(M), at["slots"])
    state = before + np.square(total).mean(axis=1)
    expected = np.where(touched[:, None], 1 - RATE * decay, 1.0) * at["rows"].astype(np.float64)
    expected -= RATE / (np.sqrt(state) + 1e-8)[:, None] * total / STEPS[numbers]
    expected = np.clip(expected, -LARGEST[numbers], LARGEST[numbers])
    roundings = np.ones_like(expected)
    if numbers == "float16":
        roundings = 2.0 ** np.maximum(np.floor(np.log2(np.maximum(np.abs(expected), 1e-9))) - 10, -24)

    draws = np.empty((4000, M, D))
    for seed in range(len(draws)):
        own = before.copy()
        draws[seed] = trained(numbers, at, gradients, own, decay=decay, seed=seed)
    np.testing.assert_allclose(own, state, rtol=1e-5)
    assert (np.abs(draws - expected) / roundings).max() < 1 + FLOAT32_ERRORS[numbers]
    errors = (np.mean(draws, axis=0) - expected) / roundings
    np.testing.assert_allclose(errors, 0, atol=0.04)  # five standard errors
    np.testing.assert_array_equal(trained(numbers, at, gradients, before.copy(), decay=decay, seed=7), draws[7])


def moved(start: float, by: float, numbers: str, *, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Rows that all start at one number, and are moved by one update: gradients of 1 make a step of the rate."""
    at = {"rows": np.full(shape, start, numbers), "slots": np.arange(shape[0]), "weights": np.empty(0, np.float32)}
    at["lengths"] = np.ones(shape[0], np.int64)
    gradients = np.full(shape, -np.sign(by), np.float32)
    state = np.zeros(shape[0], np.float32)
    return trained(numbers, at, gradients, state, rate=abs(by) * STEPS[numbers], decay=0.0, seed=seed)


@pytest.mark.parametrize("exponent", [-24, -20, -15, -14, -13, -3, 9, 15])
def test_float16_numbers_are_rounded_without_a_bias(exponent: int) -> None:
    """A quarter of the way to the next number: near 0, where the distance of numbers changes, and among the largest."""
    number = np.float16(2.0**exponent)
    above = np.nextafter(number, np.float16(np.inf)).astype(np.float64)
    for sign in (1, -1):
        way = sign * (above - number) / 4
        found = sign * moved(sign * number, way, "float16", shape=(400, 500), seed=exponent + 50)
        assert set(np.unique(found)) == {number, above}
        assert abs((found == above).mean() - 0.25) < 0.005  # five standard errors


@pytest.mark.parametrize("numbers", FORMATS)
@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_too_large_stays_at_the_largest(numbers: str, sign: int) -> None:
    for way in (LARGEST[numbers], 1e9):
        found = moved(sign * LARGEST[numbers], sign * way, numbers, shape=(2, 3))
        np.testing.assert_array_equal(found, sign * LARGEST[numbers])


def test_a_float16_number_that_is_none_stays_to_be_seen() -> None:
    assert np.isnan(moved(1.0, np.nan, "float16", shape=(2, 3))).all()
