"""Rows of int8 numbers: sums and updates against plain loops, and rounding that is right on average."""

import numpy as np
import pytest

from torchrec_cce.kernels.quantized_rows import pool_rows, train_rows

RNG = np.random.default_rng(0)
M, D, B = 20, 6, 9
STEP = 0.03


def case(*, weighted: bool) -> dict[str, np.ndarray]:
    lengths = RNG.integers(0, 5, B).astype(np.int32)
    slots = RNG.integers(0, M, lengths.sum())
    weights = RNG.random(len(slots)).astype(np.float32) if weighted else np.empty(0, np.float32)
    rows = RNG.integers(-127, 128, (M, D)).astype(np.int8)
    return {"rows": rows, "slots": slots, "lengths": lengths, "weights": weights}


@pytest.mark.parametrize("weighted", [False, True])
def test_sums_of_bags(weighted: bool) -> None:
    at = case(weighted=weighted)
    out = np.zeros((B, D), np.float32)
    pool_rows(at["rows"], np.float32(STEP), at["slots"], at["lengths"], at["weights"], out)

    weights = at["weights"] if weighted else np.ones(len(at["slots"]))
    each = weights[:, None] * at["rows"][at["slots"]] * STEP
    bags = np.arange(B).repeat(at["lengths"])
    expected = np.stack([each[bags == bag].sum(axis=0) for bag in range(B)])
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def trained(
    at: dict[str, np.ndarray], gradients: np.ndarray, state: np.ndarray, *, decay: float, seed: int
) -> np.ndarray:
    rows = at["rows"].copy()
    train_rows(
        rows,
        state,
        np.float32(STEP),
        np.argsort(at["slots"], kind="stable"),
        at["slots"],
        np.arange(B).repeat(at["lengths"]),
        at["weights"],
        gradients,
        np.float32(0.1),
        np.float32(decay),
        np.float32(1e-8),
        np.uint64(seed),
    )
    return rows


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_an_update_is_row_wise_adagrad_up_to_a_step_and_on_average_exactly(weighted: bool, decay: float) -> None:
    at = case(weighted=weighted)
    gradients = RNG.normal(size=(B, D)).astype(np.float32)
    before = RNG.random(M).astype(np.float32)

    weights = at["weights"] if weighted else np.ones(len(at["slots"]))
    total = np.zeros((M, D))
    np.add.at(total, at["slots"], weights[:, None] * gradients[np.arange(B).repeat(at["lengths"])])
    touched = np.isin(np.arange(M), at["slots"])
    state = before + np.square(total).mean(axis=1)
    expected = np.where(touched[:, None], 1 - 0.1 * decay, 1.0) * at["rows"]
    expected -= 0.1 / (np.sqrt(state) + 1e-8)[:, None] * total / STEP
    expected = np.clip(expected, -127, 127)

    draws = []
    for seed in range(4000):
        own = before.copy()
        rows = trained(at, gradients, own, decay=decay, seed=seed)
        np.testing.assert_allclose(own, state, rtol=1e-5)
        assert np.abs(rows - expected).max() < 1 + 1e-4
        draws.append(rows)
    np.testing.assert_allclose(np.mean(draws, axis=0), expected, atol=0.04)  # five standard errors
    np.testing.assert_array_equal(trained(at, gradients, before.copy(), decay=decay, seed=7), draws[7])
