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


@given(
    num_ids=st.integers(1, 300),
    share=st.floats(0, 1.2),
    most=st.sampled_from([1, 3, 10**6]),
    seed=st.integers(0, 2**16),
)
def test_where_only_who_was_seen_is_admitted_rows_stay_free(num_ids: int, share: float, most: int, seed: int) -> None:
    """No frequency known: nobody was seen. Those of age 0 in the phase before are last, but admitted."""
    residency, max_residents = residency_of(num_ids, phases=3, seed=seed), max(1, int(share * num_ids))
    frequencies = np.random.default_rng(seed).integers(0, most, num_ids)

    def admitted(counted: np.ndarray | None) -> np.ndarray:
        ages = admitted_ages(residency, max_residents, frequencies=counted, seed=seed, seen_only=True)
        return np.flatnonzero(ages == 0)

    found, seen = admitted(frequencies), np.flatnonzero(frequencies)
    assert np.isin(found, seen).all()
    assert min(len(seen), max_residents) - 2 <= len(found) <= max_residents
    scores = scores_of(residency, frequencies)
    np.testing.assert_array_equal(np.sort(scores[found]), np.sort(scores[seen])[len(seen) - len(found) :])
    assert len(admitted(None)) == 0


@given(
    num_ids=st.integers(1, 300),
    free=st.integers(0, 100),
    most=st.sampled_from([1, 3, 10**6]),
    seed=st.integers(0, 2**16),
)
def test_in_an_open_phase_what_is_free_goes_to_the_most_frequent_who_never_had_a_row(
    num_ids: int, free: int, most: int, seed: int
) -> None:
    phase = residency_of(num_ids, phases=3, seed=seed).next_phase(residency_of(num_ids, phases=0, seed=seed).ages)
    frequencies = np.random.default_rng(seed).integers(0, most, num_ids)
    taken = np.count_nonzero(phase.ages == 0)

    ages = admitted_ages(phase, max(1, taken + free), frequencies=frequencies, seed=seed)

    arrived, wanting = np.flatnonzero(ages != phase.ages), np.flatnonzero((phase.ages == 255) & (frequencies > 0))
    assert (ages[arrived] == 0).all()
    assert np.isin(arrived, wanting).all()
    assert min(len(wanting), free) - 2 <= len(arrived) <= max(free, 1 - taken)
    expected = np.sort(frequencies[wanting])[len(wanting) - len(arrived) :]
    np.testing.assert_array_equal(np.sort(frequencies[arrived]), expected)


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
    assert np.abs(rows[is_new]).max() <= 0.02
    assert len(np.unique(rows[is_new], axis=0)) == is_new.sum()
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in fresh()]), rows)


def test_rows_of_arrivals_are_their_own_and_those_of_others_are_left() -> None:
    before = Residency.nobody(150_000).next_phase(np.full(150_000, 255, np.uint8))
    drawn = []
    for seed in (1, 2, 3):
        frequencies = np.random.default_rng(seed).integers(0, 2, before.num_ids)
        taken = before.slots.num_slots
        ages = admitted_ages(before, taken + 20_000, frequencies=frequencies, seed=seed)
        order = np.empty(np.count_nonzero(ages == 0), np.uint32)
        before.extend_order(ages, order)
        after = before.topped_up(ages, order)
        parts = list(fresh_rows(before, after, seed=2, shrinkage=0.25, embed=embed))
        sizes = [len(rows) for _, rows in parts]
        assert [first for first, _ in parts] == (taken + np.cumsum([0, *sizes]))[:-1].tolist()
        assert sum(sizes) == after.slots.num_slots - taken > 19_000
        drawn += [rows for _, rows in parts]
        before = after
    rows = np.concatenate(drawn)
    assert np.abs(rows).max() <= 0.02
    assert len(np.unique(rows, axis=0)) == len(rows)
