"""Rows for a table's IDs, wherever the table lives: who gets one at the start of a phase or in it, and what it starts
from."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from torchrec_cce.clustering.admission import admitted_ages, fresh_rows
from torchrec_cce.hashing import derive_seed
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.renumbering import Renumbering
from torchrec_cce.maps.residency import Residency, Slots
from torchrec_cce.methods.cce import CCEConfig
from torchrec_cce.modules.recluster import ResidentStore

Make = Callable[[int, np.dtype[Any], Callable[[npt.NDArray[Any]], object]], npt.NDArray[Any]]
"""An array of so many numbers, once a function has filled it in."""


def _in_memory(size: int, dtype: np.dtype[Any], fill: Callable[[npt.NDArray[Any]], object]) -> npt.NDArray[Any]:
    out = np.empty(size, dtype)
    fill(out)
    return out


def rows_given(
    config: CCEConfig,
    pointer_map: PointerMap,
    weights: npt.NDArray[np.float32],
    before: Residency,
    store: ResidentStore,
    *,
    frequencies: npt.NDArray[np.integer] | None,
    seed: int,
    make: Make = _in_memory,
) -> tuple[Residency, Callable[[], None]]:
    """The phase after `before`; or the same once others arrived, if it is open.

    Args:
        weights: [2·c·k, d/c], the codewords.
        store: of the rows.
        frequencies: [n] counts, see `admitted_ages`.
        seed: of all tables, from which each derives its own.
        make: where the new arrays are.

    Returns:
        The residency, and what writes to `store` the rows that were given. Until it is called, nothing has changed.
    """
    assert config.residents is not None
    seed = derive_seed(seed, config.name)
    after = _next_residency(config, before, frequencies=frequencies, seed=seed, make=make)
    fresh = fresh_rows(
        before,
        after,
        seed=seed,
        shrinkage=config.residents.shrinkage,
        embed=lambda positions: config.embed(weights, pointer_map.codebook_codes(positions)),
    )
    return after, partial(store.fill if before.is_open else store.restart, fresh)


def _next_residency(
    config: CCEConfig, before: Residency, *, frequencies: npt.NDArray[np.integer] | None, seed: int, make: Make
) -> Residency:
    assert config.residents is not None
    num_rows = config.max_residents
    choose = partial(
        admitted_ages,
        before,
        num_rows if before.is_open else config.residents.num_admitted(num_rows),
        frequencies=frequencies,
        seed=seed,
        seen_only=config.residents.first_come,
        num_threads=os.cpu_count() or 1,
    )
    ages = make(before.num_ids, np.dtype(np.uint8), lambda out: choose(out=out))
    if not before.is_open:
        return before.next_phase(ages)
    num_residents = Slots(ages).num_slots
    if num_residents == before.slots.num_slots:
        return before
    order = make(num_residents, np.dtype(np.uint32), lambda out: before.extend_order(ages, out))
    return before.topped_up(ages, order)


def carried_over(residency: Residency, renumbering: Renumbering, *, make: Make = _in_memory) -> Residency:
    """A residency by the positions of another map: ages and rows stay with their raw IDs, and a phase goes on. A
    resident that the other map does not know is none any more.

    Args:
        make: where the new arrays are.
    """
    num_ids = renumbering.new.num_ids
    if renumbering.changes_nothing:
        return residency
    if residency.phases == 0:
        return Residency.nobody(num_ids)
    ages = make(num_ids, np.dtype(np.uint8), lambda out: renumbering.ages(residency, out))
    order = None
    if residency.is_open:
        size = Slots(ages).num_slots
        order = make(size, np.dtype(np.uint32), lambda out: renumbering.order(residency, ages, out))
    return replace(residency, ages=ages, order=order)
