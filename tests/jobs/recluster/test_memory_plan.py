"""Clustering in a given memory: the bounds are compared with what is allocated."""

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from torchrec_cce.clustering.column import PAIR
from torchrec_cce.clustering.entropy import pointer_entropies
from torchrec_cce.clustering.fold import ResidentRows
from torchrec_cce.clustering.settings import HelperInit, ReclusterConfig
from torchrec_cce.clustering.task import TableTask
from torchrec_cce.errors import ConfigError
from torchrec_cce.jobs.recluster.memory_plan import _Size, memory_plan
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.residency import Residency
from torchrec_cce.methods.cce import CCEEmbeddingBagConfig
from torchrec_cce.modules.recluster import TableRows, table_task

GIB = 1 << 30


def make_task(
    *,
    num_ids: int,
    num_columns: int,
    num_rows: int,
    width: int,
    state_width: int = 1,
    frequencies: bool = False,
    helper_init: HelperInit = "zero",
) -> TableTask:
    rng = np.random.default_rng(0)
    found = PointerMap.hashed(num_ids=num_ids, num_columns=num_columns, num_rows=num_rows, seed=0)
    config = CCEEmbeddingBagConfig(
        name="t",
        num_embeddings=num_ids,
        embedding_dim=num_columns * width,
        feature_names=["t"],
        num_rows=num_rows,
        num_columns=num_columns,
    )
    words = 2 * num_columns * num_rows
    return table_task(
        config,
        found,
        TableRows(
            weights=rng.normal(size=(words, width)).astype(np.float32),
            states={"state": rng.random((words, state_width), dtype=np.float32)},
        ),
        seed=0,
        frequencies=rng.integers(0, 5, num_ids) if frequencies else None,
        settings=ReclusterConfig(
            num_iterations=1, points_per_centroid=64, num_threads=1, chunk_size=1 << 14, helper_init=helper_init
        ),
    )


def make_fold(*, num_ids: int, num_columns: int, num_rows: int, width: int, share: float) -> TableTask:
    """As `make_task`, of a table of whose IDs a share has rows."""
    rng = np.random.default_rng(0)
    task = make_task(num_ids=num_ids, num_columns=num_columns, num_rows=num_rows, width=width)
    ages = np.where(rng.random(num_ids) < share, 0, 1).astype(np.uint8)
    rows = rng.normal(size=(np.count_nonzero(ages == 0), num_columns * width)).astype(np.float32)
    return replace(task, residents=ResidentRows(residency=Residency(ages=ages, phases=1, is_open=True), rows=rows))


def peak_of(function: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes that numpy and Python allocate at most while `function` runs, and what it returns."""
    function()  # compiles
    tracemalloc.start()
    result = function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, result


@pytest.mark.parametrize(
    "task",
    [
        make_task(num_ids=200_000, num_columns=4, num_rows=256, width=4),
        make_task(num_ids=200_000, num_columns=4, num_rows=2048, width=4, frequencies=True, helper_init="residual"),
        make_task(num_ids=100_000, num_columns=2, num_rows=512, width=16, state_width=16),
        make_task(num_ids=100_000, num_columns=8, num_rows=1024, width=2, state_width=2, helper_init="residual"),
        make_fold(num_ids=200_000, num_columns=8, num_rows=256, width=4, share=0.25),
        make_fold(num_ids=50_000, num_columns=4, num_rows=64, width=8, share=1.0),
    ],
    ids=["pairs", "residual", "wide", "narrow", "fold", "fold of few IDs"],
)
def test_bounds_hold_and_are_not_far_off(task: TableTask) -> None:
    most, chunk_size = 1 << 15, 1 << 14
    size, clustering = _Size(task), task.clustering
    train, (column,) = peak_of(lambda: replace(task).clustering.train([0]))
    centroids = [column.centroids] * clustering.num_columns
    pairs_peak, pairs = 0, None
    if clustering.num_pairs:
        pairs = np.empty(clustering.num_pairs, PAIR)
        clustering.nearest_pairs(centroids, 0, clustering.num_pairs, pairs)
        part = np.empty(min(most, len(pairs)), PAIR)
        pairs_peak, _ = peak_of(lambda: clustering.nearest_pairs(centroids, 0, len(part), part))
        pairs_peak += part.nbytes
    pointers = np.empty((clustering.num_ids, clustering.num_columns), clustering.pointer_dtype)
    assign, totals = peak_of(lambda: clustering.assign(centroids, 0, most, pointers[:most], pairs))
    result = pointers[:most].nbytes + totals.nbytes
    measured = max(train, pairs_peak, assign + 2 * result)
    assert measured <= size.worker(most, chunk_size) <= 4 * measured
    clustering.assign(centroids, 0, clustering.num_ids, pointers, pairs)
    finish, _ = peak_of(lambda: clustering.finish(centroids, totals))
    entropies, _ = peak_of(lambda: pointer_entropies(pointers, clustering.num_rows))
    assert max(finish, entropies) <= size.last <= 6 * (finish + entropies) + (32 << 20)  # of a histogram, at most


def test_less_memory_means_smaller_steps_down_to_an_error_that_names_the_least() -> None:
    task = make_task(num_ids=40_000_000, num_columns=4, num_rows=1024, width=4)
    roomy = memory_plan([task], 2, 8 * GIB)
    assert (roomy.ids_at_a_time, roomy.chunk_size, roomy.threads_per_column) == (1 << 20, 1 << 14, 1)
    assert roomy.memory_bytes <= 8 * GIB
    assert roomy.disk_bytes == 40_000_000 * 4 * 2 + 16 * 4 * 1024**2
    with pytest.raises(ConfigError, match=r"memory_bytes=5 is too little for these tables and 2 workers") as error:
        memory_plan([task, task], 2, 5)
    least = int(str(error.value).split("at least ")[1].split()[0])
    tight = memory_plan([task, task], 2, least + (4 << 20))
    assert tight.ids_at_a_time < roomy.ids_at_a_time
    assert tight.chunk_size <= tight.ids_at_a_time
    assert (tight.tables_at_a_time, memory_plan([task, task], 2, 8 * GIB).tables_at_a_time) == (1, 2)


def test_what_is_needed_does_not_grow_with_the_ids() -> None:
    few, many = (make_task(num_ids=n, num_columns=4, num_rows=1024, width=4) for n in (10_000_000, 1_000_000_000))
    needs = [memory_plan([task], 2, 8 * GIB).memory_bytes for task in (few, many)]
    assert abs(needs[1] - needs[0]) < 32 << 20


def test_workers_that_have_no_column_help_others_with_theirs() -> None:
    task = make_task(num_ids=10_000, num_columns=2, num_rows=16, width=4)
    assert memory_plan([task], 7, 64 * GIB).threads_per_column == 3
    assert memory_plan([task, replace(task)], 7, 64 * GIB).threads_per_column == 1
    assert memory_plan([], 7, 64 * GIB).threads_per_column == 7
