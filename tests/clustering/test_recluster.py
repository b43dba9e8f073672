"""Clustering a table in this process: against plain definitions, whatever the chunks and threads."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.cce_tables import Table, assert_same, members_mean, recluster
from tests.support.kernel_references import reference_nearest
from torchrec_cce.clustering import column as column_module
from torchrec_cce.clustering.entropy import pointer_entropies
from torchrec_cce.clustering.kmeans.kmeans import kmeans
from torchrec_cce.clustering.recluster import Reclustered
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.clustering.table import TableClustering

pytest.importorskip("faiss")


@pytest.mark.parametrize("n", [1, 5, 37, 300, 5000])
@pytest.mark.parametrize("helper_init", ["zero", "residual"])
@pytest.mark.parametrize("weighted", [False, True])
def test_against_plain_definitions(n: int, helper_init: str, weighted: bool) -> None:
    k = 10
    table = Table.random(n=n, k=k, seed=n)
    frequencies = np.random.default_rng(1).integers(1, 50, n) if weighted else None
    done = table.recluster(helper_init=helper_init, frequencies=frequencies)
    assert done.pointers.shape == (n, 3)
    assert done.pointers.dtype == np.uint16
    costs = np.zeros(n)
    for column in range(3):
        old, (codebook, helper) = table.embeddings(column), done.weights[column]
        pointers = done.pointers[:, column].astype(np.int64)
        _, best = reference_nearest(old, codebook)
        chosen = np.square(old.astype(np.float64) - codebook[pointers]).sum(axis=1)
        used = max(1, min(k, len(np.unique(old, axis=0))))
        assert pointers.max() < used
        if used < k:
            np.testing.assert_array_equal(codebook[used:], 0)
            np.testing.assert_array_equal(old, codebook[pointers])
        else:
            assert (chosen <= best * (1 + 1e-6)).all()
        costs += chosen
        residuals = old.astype(np.float64) - codebook[pointers]
        expected = members_mean(residuals, table.helper_codes[column], k) if helper_init == "residual" else 0
        np.testing.assert_allclose(helper, np.broadcast_to(expected, helper.shape), atol=1e-6)
        h, h_helper = table.codes[column]
        for name, state in table.row_states.items():
            pair_means = (state[column, 0, h].astype(np.float64) + state[column, 1, h_helper]) / 2
            new = done.row_states[name][column]
            np.testing.assert_allclose(new[0], members_mean(pair_means, pointers, k), rtol=1e-6, atol=1e-12)
            np.testing.assert_array_equal(new[1], 0)
    assert done.objective == pytest.approx(np.average(costs, weights=frequencies), rel=1e-5, abs=1e-12)
    assert done.share_changed == (done.pointers != table.codes[:, 0].T).mean()
    assert done.entropies == pointer_entropies(done.pointers, k)
    assert done.seconds > 0


@pytest.mark.parametrize("n", [90, 3000])
@pytest.mark.parametrize("helper_init", ["zero", "residual"])
@pytest.mark.parametrize("weighted", [False, True])
def test_chunks_and_threads_change_nothing(n: int, helper_init: str, weighted: bool) -> None:
    table = Table.random(n=n)
    frequencies = np.random.default_rng(1).random(n) if weighted else None

    def run(chunk_size: int, num_threads: int) -> Reclustered:
        return table.recluster(
            helper_init=helper_init,
            frequencies=frequencies,
            points_per_centroid=20,
            chunk_size=chunk_size,
            num_threads=num_threads,
        )

    expected = run(65536, 1)
    for chunk_size, num_threads in ((3 if n > 100 else 1, 2), (7, 1), (1000, 8), (65536, 3)):
        assert_same(run(chunk_size, num_threads), expected)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, 400),
    k=st.integers(1, 25),
    c=st.integers(1, 4),
    w=st.integers(1, 5),
    chunk_size=st.integers(1, 500),
    residual=st.booleans(),
)
def test_any_chunk_size_on_any_table(
    seed: int, n: int, k: int, c: int, w: int, chunk_size: int, residual: bool
) -> None:
    table = Table.random(n=n, k=k, c=c, w=w, seed=seed)
    options = {"helper_init": "residual" if residual else "zero", "points_per_centroid": 5, "num_iterations": 3}
    whole = table.recluster(dtype=np.uint8, seed=seed, **options)
    assert_same(table.recluster(dtype=np.uint8, seed=seed, chunk_size=chunk_size, **options), whole)
    assert np.isfinite(whole.weights).all()


@pytest.mark.parametrize("backend", ["numba", "faiss", "sklearn"])
def test_the_backend_that_was_chosen_finds_the_words(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same start; where no cluster runs empty, scikit-learn's words are ours."""
    asked = []

    def spy(*args: Any, **options: Any) -> npt.NDArray[np.float32]:
        asked.append(options["backend"])
        return kmeans(*args, **options)

    table = Table.random(n=2000, k=40)
    expected = table.recluster()
    monkeypatch.setattr(column_module, "kmeans", spy)
    found = table.recluster(backend=backend)
    assert asked == [backend] * 3
    np.testing.assert_allclose(found.objective, expected.objective, rtol=0.02)
    if backend == "sklearn":
        np.testing.assert_allclose(found.weights, expected.weights, atol=1e-5)


@pytest.mark.parametrize("helper_init", ["zero", "residual"])
def test_assigning_pairs_once_is_the_same(helper_init: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table.random(n=5000, k=12)
    monkeypatch.setattr(column_module, "_PAIRS_AT_A_TIME", 50)
    by_pair = table.recluster(helper_init=helper_init)
    monkeypatch.setattr(TableClustering, "num_pairs", 0)
    assert_same(table.recluster(helper_init=helper_init), by_pair)


def test_many_ids_a_pair_or_many_pairs_an_id_choose_the_way() -> None:
    assert Table.random(n=100, k=10).clustering().num_pairs == 0
    assert Table.random(n=101, k=10).clustering().num_pairs == 300


def test_nothing_that_was_passed_in_is_written() -> None:
    table = Table.random(n=500)
    for array in (table.weights, table.codes, table.helper_codes, *table.row_states.values()):
        array.setflags(write=False)
    frequencies = np.ones(500)
    frequencies.setflags(write=False)
    table.recluster(helper_init="residual", frequencies=frequencies)


def test_codes_are_asked_for_in_chunks_from_the_calling_thread() -> None:
    table = Table.random(n=1000)
    sizes: list[int] = []
    threads: set[int] = set()

    def recorded(codes: npt.NDArray[np.int64]) -> Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]:
        def look_up(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
            assert ids.dtype == np.int64
            sizes.append(len(ids))
            threads.add(threading.get_ident())
            return codes[..., ids]

        return look_up

    recluster(
        weights=table.weights,
        num_ids=1000,
        old_codes=recorded(table.codes),
        new_helper_codes=recorded(table.helper_codes),
        pointer_dtype=np.uint8,
        seed=0,
        config=ReclusterConfig(chunk_size=64, num_threads=4, helper_init="residual"),
    )
    assert max(sizes) == 64
    assert threads == {threading.get_ident()}


def test_new_helper_codes_are_not_asked_for_when_the_helper_is_zero() -> None:
    table = Table.random(n=100)

    def fail(_: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        raise AssertionError("not needed")

    done = recluster(
        weights=table.weights,
        num_ids=100,
        old_codes=lambda ids: table.codes[:, :, ids],
        new_helper_codes=fail,
        pointer_dtype=np.uint8,
        seed=0,
    )
    assert done.row_states == {}
    assert not done.weights[:, 1].any()


def test_a_helper_row_without_ids_is_zero() -> None:
    table = Table.random(n=500)
    table.helper_codes %= 7
    helper = table.recluster(helper_init="residual").weights[:, 1]
    assert np.isfinite(helper).all()
    assert not helper[:, 7:].any()
    assert helper[:, :7].any(axis=2).all()


def test_residual_helper_lowers_the_error() -> None:
    table = Table.random(n=400, k=20)

    def error(done: Reclustered) -> float:
        return sum(
            float(np.square(table.embeddings(j) - w[0, p] - w[1, h]).sum())
            for j, (w, p, h) in enumerate(zip(done.weights, done.pointers.T, table.helper_codes, strict=True))
        )

    assert error(table.recluster(helper_init="residual")) < 0.99 * error(table.recluster())


def test_seed_draws_another_clustering() -> None:
    table = Table.random(n=2000)
    assert_same(table.recluster(seed=4), table.recluster(seed=4))
    assert not np.array_equal(table.recluster(seed=4).weights, table.recluster(seed=5).weights)


def test_columns_have_seeds_of_their_own() -> None:
    table = Table.random(n=2000, c=1)
    twice = Table(
        weights=np.repeat(table.weights, 2, axis=0),
        codes=np.repeat(table.codes, 2, axis=0),
        helper_codes=np.repeat(table.helper_codes, 2, axis=0),
        row_states={},
    )
    done = twice.recluster()
    assert not np.array_equal(done.weights[0], done.weights[1])


@pytest.mark.parametrize("points_per_centroid", [4, 256])
def test_ids_that_were_never_seen_do_not_train(points_per_centroid: int) -> None:
    """Weighted directly or sampled, the centroids follow the frequencies, and all IDs still get pointers."""
    table = Table.random(n=600, c=1, k=8)
    table.weights[0, 0, 4:] += 100
    seen = table.codes[0, 0] < 4
    done = table.recluster(frequencies=seen * 3, points_per_centroid=points_per_centroid)
    assert done.weights[0, 0].max() < 50
    expected, _ = reference_nearest(table.embeddings(0), done.weights[0, 0])
    np.testing.assert_array_equal(done.pointers[:, 0], expected)
    assert done.objective < 10  # unseen IDs are 100 away and weigh nothing
    assert table.recluster(points_per_centroid=points_per_centroid).weights[0, 0].max() > 50


def test_frequent_ids_are_approximated_better() -> None:
    table = Table.random(n=4000, c=1, k=40, w=3)
    frequencies = np.where(np.arange(4000) < 40, 1000, 1)
    embeddings = table.embeddings(0)

    def error_of_frequent(done: Reclustered) -> float:
        return float(np.square(embeddings[:40] - done.weights[0, 0, done.pointers[:40, 0]]).sum())

    assert error_of_frequent(table.recluster(frequencies=frequencies)) < 0.5 * error_of_frequent(table.recluster())


@pytest.mark.parametrize("exponent", [-200, 40, 200])
def test_scaling_frequencies_changes_nothing(exponent: int) -> None:
    table = Table.random(n=700)
    frequencies = np.random.default_rng(0).integers(0, 9, 700)
    small, large = table.recluster(frequencies=frequencies), table.recluster(frequencies=frequencies * 2.0**exponent)
    assert_same(small, large)


def test_a_clustering_of_what_is_clustered_changes_few_pointers() -> None:
    """Embeddings in tight groups, the old pointers naming them: the new ones name them the same."""
    rng = np.random.default_rng(0)
    table = Table.random(n=4000, k=16)
    table.weights[:, 0] = rng.standard_normal((3, 16, 4)) * 10
    table.weights[:, 1] *= 0.01
    table.codes[:, 0] = rng.integers(0, 16, (3, 4000))
    assert table.recluster(num_iterations=50, seed=3).share_changed < 0.35
