"""Who gets a private row in the next phase, and what it starts from: IDs that are frequent and have waited long."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from torchrec_cce.errors import ConfigError
from torchrec_cce.hashing import derive_seed
from torchrec_cce.kernels.slots import ANYBODY, ARRIVED, DIGIT_BITS, NEVER, OLDEST, SEEN, admit_above, count_digits
from torchrec_cce.maps.residency import Residency

Embed = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float32]]
"""positions [N] int64 → [N, d] float32, what their codewords are."""

_CHUNK = 1 << 20
_UNKNOWN = np.zeros(0, np.int64)
_POSITIONS = 1 << 16
"""Never another: what is drawn for a position depends on where they are cut."""
_SPREAD = 0.02
"""Of the first row of an ID, up and down. Without it, all who never had a row would start, and move, alike."""


def admitted_ages(
    residency: Residency,
    max_residents: int,
    *,
    frequencies: npt.NDArray[np.integer] | None,
    seed: int,
    seen_only: bool = False,
    num_threads: int = 1,
    out: npt.NDArray[np.uint8] | None = None,
) -> npt.NDArray[np.uint8]:
    """The ages, [n] uint8, once the next phase has begun: 0 for those that get a row.

    Positions stand in the order of `(frequency + 1)·age²`; of equal ones, a draw decides. An ID that never had a row is
    as old as there were phases, and one more. The result depends on the arguments alone, not on the threads. Beside
    `out`, nothing of the size of a table is held.

    If the phase of `residency` is open, it goes on: those who have a row keep it, and what is free goes in the same
    order to IDs that were seen and never had one.

    Args:
        max_residents: at least 1. As many are admitted, or so few less as do not matter: of IDs that stand equal, in
            the draw too (one in 65,536 does), all are admitted or none.
        frequencies: [n] integers, at least 0; None if they are not known, which is as if all were 0.
        seed: of the draw. Every phase derives its own from it.
        seen_only: whether an ID gets a row only if its frequency is above 0.
        out: [n], to write to and return; it may be the ages of `residency`. None = a new array.

    Raises:
        ConfigError: frequencies of another shape, or negative ones; `max_residents` below 1.
    """
    ages, never = residency.ages, np.uint64(min(residency.phases + 1, OLDEST))
    who, free = SEEN if seen_only else ANYBODY, max_residents
    if max_residents < 1:
        raise ConfigError(f"max_residents={max_residents} is not at least 1")
    counted = _UNKNOWN if frequencies is None else frequencies
    if frequencies is not None and (frequencies.shape != ages.shape or not np.issubdtype(counted.dtype, np.integer)):
        raise ConfigError(
            f"frequencies are {frequencies.dtype} {list(frequencies.shape)}, not integers [{len(ages)}], one an ID"
        )
    if any(np.any(counted[start : start + _CHUNK] < 0) for start in range(0, len(counted), _CHUNK)):
        raise ConfigError("some frequencies are negative; pass counts ≥ 0")
    if residency.is_open:
        who, free = ARRIVED, max_residents - residency.slots.num_taken
    draw = np.uint64(derive_seed(seed, "admission", residency.phases))
    out = np.empty(ages.shape, ages.dtype) if out is None else out
    starts = range(0, len(ages), _CHUNK)

    def wanting(start: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.integer], int, np.uint64, np.uint64, int]:
        part = slice(start, start + _CHUNK)
        return np.ascontiguousarray(ages[part]), counted[part], start, never, draw, who

    def count(start: int, prefix: int, shift: int) -> npt.NDArray[np.int64]:
        counts = np.zeros(1 << DIGIT_BITS, np.int64)
        count_digits(*wanting(start), np.uint64(prefix), np.uint64(shift), counts)
        return counts

    def admit(start: int) -> None:
        admit_above(*wanting(start), np.uint64(threshold), out[start : start + _CHUNK])

    with ThreadPoolExecutor(num_threads) as pool:
        # From the highest digit down: all from `threshold` on fit in, and the digit below it is looked into.
        prefix, above = 0, 0
        for shift in range(64 - DIGIT_BITS, -1, -DIGIT_BITS):
            parts = pool.map(lambda start: count(start, prefix, shift), starts)  # noqa: B023  done in this round
            counts = sum(parts, np.zeros(1 << DIGIT_BITS, np.int64))
            from_here = above + np.cumsum(counts[::-1])[::-1]
            fits = int(np.searchsorted(-from_here, -free))
            threshold = ((prefix << DIGIT_BITS) + fits) << shift
            if fits == 0:
                break
            prefix = (prefix << DIGIT_BITS) + fits - 1
            above = int(from_here[fits]) if fits < len(from_here) else above
        threshold = min(max(threshold, 1), 2**64 - 1)
        list(pool.map(admit, starts))
    return out


def fresh_rows(
    before: Residency, after: Residency, *, seed: int, shrinkage: float, embed: Embed
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """What the rows that IDs get in `after` start from: the first slot of some rows, and these, [m, d] float32.

    A row takes a share of what the codewords give away again, as weight decay would: all that an ID has learned was
    learned by few, and is believed a little less each time. The row of an ID that never had one is small and random.

    Args:
        before: the residency that `after` followed. In an open phase, those who have a row keep it as it is.
        shrinkage: that share, 0 to 1.
        embed: of the codewords alone.
    """
    slot = before.slots.num_taken if before.is_open else 0
    drawn = ("arrivals", after.phases, slot) if slot else ("rows", after.phases)
    for number, start in enumerate(range(0, after.num_ids, _POSITIONS)):
        part = slice(start, start + _POSITIONS)
        admitted = after.ages[part] == 0
        if before.is_open:
            admitted &= before.ages[part] != 0
        residents = np.flatnonzero(admitted)
        rows = -np.float32(shrinkage) * embed(start + residents)
        is_new = before.ages[start + residents] == NEVER
        rng = np.random.default_rng(derive_seed(seed, *drawn, number))
        rows[is_new] = rng.uniform(-_SPREAD, _SPREAD, rows[is_new].shape)
        if len(rows):
            yield slot, rows
        slot += len(rows)
