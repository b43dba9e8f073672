"""Rows of int8 and float16 numbers: sums and updates against plain loops, and rounding that is right on average."""

import numpy as np
import pytest

from torchrec_cce.hashing import derive_seed, mixed
from torchrec_cce.kernels.quantized_rows import pool_rows, round_rows, train_rows

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
    """Into the columns 3 to 9 of 10, from the third row on."""
    at = case(numbers, weighted=weighted)
    whole, starts = np.full((2 + B, 10), np.nan, np.float32), np.empty_like(at["slots"])
    first = 2 * 10 + 3
    pool_rows(
        stored(at["rows"]),
        STEPS[numbers],
        at["slots"],
        at["lengths"],
        at["weights"],
        first,
        10,
        whole.reshape(-1),
        starts,
    )
    out = whole[2:, 3 : 3 + D].copy()
    whole[2:, 3 : 3 + D] = np.nan
    assert np.isnan(whole).all()  # what lies beside is as before
    np.testing.assert_array_equal(starts, first + 10 * np.arange(B).repeat(at["lengths"]))

    weights = at["weights"] if weighted else np.ones(len(at["slots"]))
    each = weights[:, None] * at["rows"][at["slots"]].astype(np.float64) * STEPS[numbers]
    bags = np.arange(B).repeat(at["lengths"])
    expected = np.stack([each[bags == bag].sum(axis=0) for bag in range(B)])
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_every_float16_number_is_read_as_what_it_is() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).reshape(-1, 16)
    out = np.zeros(every.shape, np.float32)
    one_by_one = np.ones(len(every), np.int64)
    slots, starts = np.arange(len(every)), np.empty(len(every), np.int64)
    pool_rows(every, np.float32(1), slots, one_by_one, np.empty(0, np.float32), 0, 16, out.reshape(-1), starts)
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
        gradients.shape[1] * np.arange(len(at["lengths"])).repeat(at["lengths"]),
        at["weights"],
        gradients.reshape(-1),
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


def draws_of_row(seed: int, row: int, width: int) -> np.ndarray:
    """24 bits for each number of a row: the highest 24 of a hash for the first half, the next 24 for the second."""
    half = (width + 1) // 2
    hashes = [int(mixed(np.uint64(seed ^ (row * half + i)))) for i in range(half)]
    draws = [each >> 40 for each in hashes] + [each >> 16 & 0xFFFFFF for each in hashes]
    return np.array(draws[:width], np.float32) / np.float32(2**24)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of a hash, which is modulo 2⁶⁴
@pytest.mark.parametrize("width", [1, 4, 7, 32, 37])
@pytest.mark.parametrize("weighted", [False, True])
def test_an_update_of_int8_rows_is_that_of_a_plain_loop_bit_by_bit(width: int, weighted: bool) -> None:
    at, rng = case("int8", weighted=weighted), np.random.default_rng(2)
    at["rows"] = rng.integers(-127, 128, (M, width)).astype(np.int8)
    gradients = rng.normal(size=(B, width)).astype(np.float32)
    state = rng.random(M).astype(np.float32)
    expected, expected_state = at["rows"].copy(), state.copy()
    bags = np.arange(B).repeat(at["lengths"])
    for slot in np.unique(at["slots"]):
        total = np.zeros(width, np.float32)
        for i in np.flatnonzero(at["slots"] == slot):
            total += (at["weights"][i] if weighted else np.float32(1)) * gradients[bags[i]]
        sums = np.zeros(4, np.float32)
        for dim in range(width):
            sums[dim % 4 if dim < width - width % 4 else 0] += total[dim] * total[dim]
        expected_state[slot] += ((sums[0] + sums[1]) + (sums[2] + sums[3])) / np.float32(width)
        rate = np.float32(RATE) / (np.sqrt(expected_state[slot]) + np.float32(1e-8)) / STEPS["int8"]
        value = (np.float32(1) - np.float32(RATE) * np.float32(0.5)) * expected[slot] - rate * total
        expected[slot] = np.clip(np.floor(value + draws_of_row(11, int(slot), width)), -127, 127)

    found = trained("int8", at, gradients, state, decay=0.5, seed=11)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(state, expected_state)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("width", [1, 7, 8])
def test_rows_that_are_rounded_again_have_the_same_draws(width: int) -> None:
    values = np.random.default_rng(3).uniform(-4, 4, (M, width)).astype(np.float32)
    out, step = np.empty((M, width), np.int8), np.float32(0.03)
    round_rows(values, step, 5, np.uint64(12), out)
    draws = np.stack([draws_of_row(12, 5 + i, width) for i in range(M)])
    np.testing.assert_array_equal(out, np.clip(np.floor(values / step + draws), -127, 127))


def test_the_draws_of_a_row_do_not_depend_on_each_other() -> None:
    """Nor those of its neighbours, and of the next update."""
    seeds = [derive_seed("update", number) for number in range(2)]
    ups = np.stack([moved(0.0, 0.5, "int8", shape=(20_001, 8), seed=seed) for seed in seeds])
    assert set(np.unique(ups)) == {0, 1}
    draws = np.concatenate([ups[0, :-1], ups[0, 1:], ups[1, :-1]], axis=1)
    between = np.corrcoef(draws, rowvar=False) - np.eye(24)
    assert np.abs(between).max() < 5 / len(draws) ** 0.5  # five standard errors


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
