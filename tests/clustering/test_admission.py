"""Who is admitted, against a plain sort; and what rows start from."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_cce.clustering import admission
from torchrec_cce.clustering.admission import admitted_ages, fresh_rows
from torchrec_cce.errors import ConfigError
from torchrec_cce.maps.residency import Residency


def residency_of(num_ids: int, *, phases: int, seed: int) -> Residency:
    ages = np.random.default_rng(seed).choice(np.array([0, 1, 2, 9, 254, 255], np.uint8), num_ids)
    return Residency(ages=ages, phases=phases)


def scores_of(residency: Residency, frequencies: np.ndarray | None) -> np.ndarray:
    ages = residency.ages.astype(np.int64)
    waiting = np.where(ages == 255, min(residency.phases + 1, 254), ages)
    return ((0 if frequencies is None else frequencies) + 1) * waiting**2


@given(
    num_ids=st.integers(1, 300),
    share=st.floats(0, 1.2),
    phases=st.integers(0, 400),
    most=st.sampled_from([1, 10, 10**6, 2**40]),
    counted=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_those_who_are_frequent_and_waited_long_are_admitted(
    num_ids: int, share: float, phases: int, most: int, counted: bool, seed: int
) -> None:
    residency = residency_of(num_ids, phases=phases, seed=seed)
    frequencies = np.random.default_rng(seed).integers(0, most, num_ids) if counted else None
    max_residents = max(1, int(share * num_ids))

    ages = admitted_ages(residency, max_residents, frequencies=frequencies, seed=seed)

    admitted = np.flatnonzero(ages == 0)
    assert min(num_ids, max_residents) - 2 <= len(admitted) <= max_residents  # a draw of two may be equal
    scores = np.minimum(scores_of(residency, frequencies), 2**48 - 1)
    np.testing.assert_array_equal(np.sort(scores[admitted]), np.sort(scores)[num_ids - len(admitted) :])
    others = ages != 0
    before = residency.ages[others].astype(np.int64)
    np.testing.assert_array_equal(ages[others], np.where(before == 255, 255, np.minimum(before + 1, 254)))


def test_of_equals_a_draw_decides_another_one_every_phase() -> None:
    chosen = []
    for phases, seed in ((1, 0), (2, 0), (1, 1)):
        residency = Residency(ages=np.full(10_000, 255, np.uint8), phases=phases)
        chosen.append(admitted_ages(residency, 2500, frequencies=None, seed=seed) == 0)
    for one in chosen:
        assert 2400 < one.sum() <= 2500
        halves = one[:5000].sum(), one[5000:].sum()
        assert min(halves) > 1100
    assert 400 < (chosen[0] & chosen[1]).sum() < 800
    assert 400 < (chosen[0] & chosen[2]).sum() < 800


def test_the_same_for_any_number_of_threads_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    residency, frequencies = residency_of(5000, phases=3, seed=0), np.random.default_rng(1).integers(0, 9, 5000)

    def admit(num_threads: int) -> np.ndarray:
        return admitted_ages(residency, 900, frequencies=frequencies, seed=2, num_threads=num_threads)

    expected = admit(1)
    monkeypatch.setattr(admission, "_CHUNK", 77)
    for num_threads in (1, 3):
        np.testing.assert_array_equal(admit(num_threads), expected)


@pytest.mark.parametrize(
    ("frequencies", "max_residents", "message"),
    [
        (np.ones(7, np.int64), 3, r"frequencies are int64 \[7\], not integers \[10\]"),
        (np.ones(10), 3, r"frequencies are float64 \[10\], not integers \[10\]"),
        (np.arange(-1, 9), 3, "some frequencies are negative"),
        (None, 0, "max_residents=0 is not at least 1"),
    ],
)
def test_what_cannot_be_is_refused(frequencies: np.ndarray | None, max_residents: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        admitted_ages(Residency.nobody(10), max_residents, frequencies=frequencies, seed=0)


def embed(positions: np.ndarray) -> np.ndarray:
    return np.stack([positions, -positions, positions**2], axis=1).astype(np.float32)


def test_rows_take_a_share_back_but_those_of_newcomers_are_small_and_random() -> None:
    before = residency_of(200_000, phases=20, seed=0)
    after = before.next_phase(admitted_ages(before, 80_000, frequencies=None, seed=1))

    def fresh() -> list[tuple[int, np.ndarray]]:
        return list(fresh_rows(before, after, seed=2, shrinkage=0.25, embed=embed))

    parts = fresh()
    assert [first for first, _ in parts] == np.cumsum([0, *(len(rows) for _, rows in parts)])[:-1].tolist()
    rows, residents = np.concatenate([rows for _, rows in parts]), np.flatnonzero(after.ages == 0)
    assert rows.dtype == np.float32
    is_new = before.ages[residents] == 255
    np.testing.assert_allclose(rows[~is_new], -0.25 * embed(residents[~is_new]), rtol=1e-6)
    assert np.abs(rows[is_new]).max() <= 0.1
    assert len(np.unique(rows[is_new], axis=0)) == is_new.sum()
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in fresh()]), rows)
