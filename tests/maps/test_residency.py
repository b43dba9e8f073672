"""Who has a private row: slots against a plain numbering, bags against a loop, files that are whole or refused."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_cce.errors import ConfigError, MapFileError
from torchrec_cce.maps.residency import Residency, Slots, residency_bytes
from torchrec_cce.maps.residency_files import read_residencies, write_residencies


def ages_of(num_ids: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array([0, 1, 7, 254, 255], np.uint8), num_ids)


@pytest.mark.parametrize("num_ids", [0, 1, 63, 64, 65, 1000])
def test_residents_have_the_rows_in_the_order_of_their_positions(num_ids: int) -> None:
    ages = ages_of(num_ids, seed=num_ids)
    slots, residents = Slots(ages), np.flatnonzero(ages == 0)

    expected = np.full(num_ids, -1)
    expected[residents] = np.arange(len(residents))
    np.testing.assert_array_equal(slots.of(np.arange(num_ids)), expected)
    assert slots.num_slots == len(residents)
    assert [slots.before(position) for position in range(num_ids + 1)] == [
        int(np.count_nonzero(ages[:position] == 0)) for position in range(num_ids + 1)
    ]


@given(st.lists(st.integers(0, 4), max_size=30), st.integers(0, 2**32 - 1))
def test_the_residents_of_bags(lengths: list[int], seed: int) -> None:
    ages = ages_of(200, seed)
    positions = np.random.default_rng(seed).integers(-1, 200, sum(lengths))  # -1: no position

    found = Slots(ages).of_bags(positions, np.array(lengths, np.int32))

    slots, places, counts, place = [], [], [], 0
    for length in lengths:
        before = len(slots)
        for position in positions[place : place + length]:
            if position >= 0 and ages[position] == 0:
                slots.append(int(np.count_nonzero(ages[:position] == 0)))
                places.append(place)
            place += 1
        counts.append(len(slots) - before)
    assert (found.slots.tolist(), found.places.tolist(), found.lengths.tolist()) == (slots, places, counts)
    assert found.lengths.dtype == np.int32


def arrivals(num_ids: int, seed: int) -> tuple[Residency, dict[int, int]]:
    """A phase in which positions came in four lots, of which one is empty; and position → row."""
    rng = np.random.default_rng(seed)
    ages = rng.choice(np.array([1, 254, 255], np.uint8), num_ids)
    phase, rows = Residency.nobody(num_ids).next_phase(ages), {}
    for share in (0.1, 0.0, 0.2, 0.3):
        ages = ages.copy()
        ages[rng.random(num_ids) < share] = 0
        rows |= {int(p): len(rows) + n for n, p in enumerate(p for p in np.flatnonzero(ages == 0) if p not in rows)}
        order = np.empty(len(rows), np.uint32)
        phase.extend_order(ages, order)
        phase = phase.topped_up(ages, order)
    return phase, rows


@given(st.integers(0, 300), st.integers(0, 2**32 - 1))
def test_who_has_a_row_keeps_it_when_others_arrive(num_ids: int, seed: int) -> None:
    phase, rows = arrivals(num_ids, seed)
    positions = np.arange(num_ids)
    np.testing.assert_array_equal(phase.slots.of(positions), [rows.get(p, -1) for p in range(num_ids)])
    found = phase.slots.of_bags(positions, np.full(num_ids, 1, np.int64))
    np.testing.assert_array_equal(found.slots, [rows[p] for p in sorted(rows)])
    np.testing.assert_array_equal(found.places, sorted(rows))
    np.testing.assert_array_equal(phase.slots.rows(slice(1, 9)), [rows[p] for p in sorted(rows)][1:9])
    assert phase.nbytes == residency_bytes(num_ids) + 4 * len(rows)
    assert phase.closed().order is None


def test_before_the_first_phase_nothing_is_held() -> None:
    nobody = Residency.nobody(10**12)
    assert (nobody.num_ids, nobody.phases, nobody.is_open, nobody.ages[12345]) == (10**12, 0, False, 255)


def test_bytes_of_an_open_phase() -> None:
    open_phase = Residency.nobody(1000).next_phase(ages_of(1000, seed=0))
    assert open_phase.nbytes == residency_bytes(1000) == 1000 + 16 * (8 + 4)
    assert open_phase.closed().nbytes == 1000


def test_ages_of_another_kind_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"ages are int64 \[5\], not uint8 \[n\]"):
        Residency(ages=np.zeros(5, np.int64))
    with pytest.raises(ConfigError, match=r"the order is int64 \[5\], not uint32 \[m\]"):
        Residency(ages=np.zeros(5, np.uint8), order=np.arange(5))
    short = Residency(ages=np.zeros(5, np.uint8), is_open=True, order=np.arange(4, dtype=np.uint32))
    with pytest.raises(ConfigError, match="the order is of 4 residents, there are 5"):
        _ = short.slots


def written(folder: Path) -> dict[str, Residency]:
    tables = {
        "t": Residency.nobody(100).next_phase(ages_of(100, seed=1)),
        "u": Residency.nobody(70).next_phase(ages_of(70, seed=2)).closed(),
        "v": arrivals(90, seed=3)[0],
    }
    write_residencies(folder, tables)
    return tables


def test_files_are_read_as_they_were_written(tmp_path: Path) -> None:
    expected = written(tmp_path / "residents")
    found = read_residencies(tmp_path / "residents")
    assert found.keys() == expected.keys()
    for name, residency in expected.items():
        np.testing.assert_array_equal(found[name].ages, residency.ages)
        assert (found[name].phases, found[name].is_open) == (residency.phases, residency.is_open)
        np.testing.assert_array_equal(found[name].order, residency.order)


@pytest.mark.parametrize("name", ["0000.ages.arrow", "0001.ages.arrow", "0002.order.arrow", "residents.json"])
@pytest.mark.parametrize("damage", ["missing", "cut short", "one bit", "a stranger's"])
def test_damaged_files_are_named(tmp_path: Path, name: str, damage: str) -> None:
    folder = tmp_path / "residents"
    written(folder)
    path = folder / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut short":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "one bit":
        content[-3 if name.endswith("json") else len(content) // 2] ^= 64
        path.write_bytes(content)
    else:
        path.write_text('{"t": [1, 2]}')
    with pytest.raises(MapFileError, match="copy the checkpoint again"):
        read_residencies(folder)
