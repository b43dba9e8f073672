"""Clustering a table in this process: against plain definitions, whatever the chunks, threads and shares of work."""

import dataclasses
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.kernel_references import reference_nearest
from torchrec_cce.clustering import column as column_module
from torchrec_cce.clustering.column import PAIR, sum_errors
from torchrec_cce.clustering.entropy import pointer_entropies
from torchrec_cce.clustering.executor import InProcess
from torchrec_cce.clustering.kmeans.kmeans import kmeans
from torchrec_cce.clustering.recluster import Reclustered, recluster_tables
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.clustering.table import TableClustering
from torchrec_cce.errors import ClusteringError, ConfigError

pytest.importorskip("faiss")


@dataclasses.dataclass
class Table:
    """A small CCE table, with its codes written out."""

    weights: npt.NDArray[np.float32]
    codes: npt.NDArray[np.int64]
    helper_codes: npt.NDArray[np.int64]
    row_states: dict[str, npt.NDArray[np.float32]]

    @classmethod
    def random(cls, *, n: int, c: int = 3, k: int = 10, w: int = 4, seed: int = 0, offset: float = 0) -> "Table":
        rng = np.random.default_rng(seed)
        weights = rng.standard_normal((c, 2, k, w)) * np.array([1, 0.3])[:, None, None] + offset
        return cls(
            weights=weights.astype(np.float32),
            codes=rng.integers(0, k, (c, 2, n)),
            helper_codes=rng.integers(0, k, (c, n)),
            row_states={
                "momentum": rng.standard_normal((c, 2, k, w)).astype(np.float32),
                "sum": (rng.random((c, 2, k)) ** 8).astype(np.float32),
            },
        )

    @property
    def num_ids(self) -> int:
        return self.codes.shape[2]

    def embeddings(self, column: int) -> npt.NDArray[np.float32]:
        codes = self.codes[column]
        return self.weights[column, 0, codes[0]] + self.weights[column, 1, codes[1]]

    def recluster(self, **options: Any) -> Reclustered:
        return cluster(self.clustering(**options))

    def clustering(
        self, *, seed: int = 0, frequencies: Any = None, dtype: Any = np.uint16, **config: Any
    ) -> TableClustering:
        return TableClustering(
            weights=self.weights,
            num_ids=self.num_ids,
            old_codes=lambda ids: self.codes[:, :, ids],
            new_helper_codes=lambda ids: self.helper_codes[:, ids],
            row_states=self.row_states,
            frequencies=frequencies,
            pointer_dtype=dtype,
            seed=seed,
            config=ReclusterConfig(**config),
        )


def recluster(**arguments: Any) -> Reclustered:
    return cluster(TableClustering(**arguments))


def cluster(table: TableClustering) -> Reclustered:
    return recluster_tables(InProcess({"t": table}))["t"]


def assert_same(left: Reclustered, right: Reclustered) -> None:
    """The same bits, except for the time it took."""
    for name in ("pointers", "weights"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
    assert left.row_states.keys() == right.row_states.keys()
    for name, state in left.row_states.items():
        np.testing.assert_array_equal(state, right.row_states[name])
    for name in ("entropies", "objective", "share_changed"):
        assert getattr(left, name) == getattr(right, name)


def members_mean(
    values: npt.NDArray[np.floating], members: npt.NDArray[np.integer], num_rows: int
) -> npt.NDArray[np.float64]:
    """[k, …]: the mean of `values: [n, …]` over the IDs with each code; 0 without."""
    means = np.zeros((num_rows, *values.shape[1:]))
    for row in range(num_rows):
        if (members == row).any():
            means[row] = values[members == row].astype(np.float64).mean(axis=0)
    return means


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


def test_fewer_ids_than_centroids() -> None:
    table = Table.random(n=4, k=10)
    done = table.recluster(frequencies=np.array([1, 1, 0, 1]))
    assert done.pointers.max() <= 2
    for column in range(3):
        expected = np.unique(table.embeddings(column)[[0, 1, 3]], axis=0)
        np.testing.assert_array_equal(done.weights[column, 0, : len(expected)], expected)
        assert not done.weights[column, 0, len(expected) :].any()


@pytest.mark.parametrize("n", [3, 1000])
def test_identical_embeddings_share_one_centroid(n: int) -> None:
    table = Table.random(n=n)
    table.weights[...] = 0.25
    done = table.recluster(helper_init="residual")
    assert not done.pointers.any()
    np.testing.assert_array_equal(done.weights[:, 0, 0], 0.5)
    assert not done.weights[:, 0, 1:].any()
    assert not done.weights[:, 1].any()
    assert done.objective == 0
    assert done.entropies == (0, 0, 0)


def test_all_zero_weights() -> None:
    table = Table.random(n=50)
    table.weights[...] = 0
    done = table.recluster(helper_init="residual")
    assert not done.weights.any()
    assert not done.pointers.any()


@pytest.mark.parametrize("n", [1, 30])
def test_one_row(n: int) -> None:
    table = Table.random(n=n, k=1)
    done = table.recluster(dtype=np.uint8)
    assert not done.pointers.any()
    np.testing.assert_allclose(done.weights[:, 0], table.weights[:, 0] + table.weights[:, 1])
    assert done.share_changed == 0


def test_far_from_the_origin() -> None:
    near = Table.random(n=3000, k=30)
    far = dataclasses.replace(near, weights=near.weights + np.float32(1000))
    done, reference = far.recluster(helper_init="residual"), near.recluster(helper_init="residual")
    assert done.objective == pytest.approx(reference.objective, rel=0.05)
    for column in range(3):
        old, (codebook, helper) = far.embeddings(column), done.weights[column]
        chosen = done.pointers[:, column]
        assert (
            np.square(old.astype(np.float64) - codebook[chosen]).sum(axis=1)
            <= reference_nearest(old, codebook)[1] * (1 + 1e-6)
        ).all()
        residuals = old.astype(np.float64) - codebook[chosen]
        np.testing.assert_allclose(helper, members_mean(residuals, far.helper_codes[column], 30), atol=2e-4)


def test_small_states_do_not_vanish_beside_large_ones() -> None:
    table = Table.random(n=2000)
    table.row_states["sum"][:] = np.where(table.row_states["sum"] > 0.5, 1e12, 1e-9)
    done = table.recluster()
    for column in range(3):
        state = table.row_states["sum"][column].astype(np.float64)
        h, h_helper = table.codes[column]
        expected = members_mean((state[0, h] + state[1, h_helper]) / 2, done.pointers[:, column], 10)
        np.testing.assert_allclose(done.row_states["sum"][column, 0], expected, rtol=1e-5)


def test_states_of_one_value_a_row_or_of_many_dimensions() -> None:
    table = Table.random(n=100)
    table.row_states = {"blocks": np.random.default_rng(0).random((3, 2, 10, 2, 5)).astype(np.float32)}
    assert table.recluster().row_states["blocks"].shape == (3, 2, 10, 2, 5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite_is_an_error_before_anything_is_done(value: float) -> None:
    table = Table.random(n=100)
    table.weights[2, 1, 7, 0] = value
    table.weights[2, 1, 8, 3] = value

    def fail(_: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        raise AssertionError("asked for codes first")

    options: dict[str, Any] = {"old_codes": fail, "new_helper_codes": fail, "pointer_dtype": np.uint8, "seed": 0}
    with pytest.raises(ClusteringError, match=r"2 of 240 values of weights .* column 2, helper row 7"):
        recluster(weights=table.weights, num_ids=100, **options)
    table.row_states["sum"][0, 0, 3] = value
    table.weights[...] = 0
    with pytest.raises(ClusteringError, match=r"1 of 60 values of row_states\['sum'\] .* column 0, codebook row 3"):
        recluster(weights=table.weights, num_ids=100, row_states=table.row_states, **options)


@pytest.mark.parametrize(
    ("frequencies", "message"),
    [
        (np.zeros(100), "all 100 frequencies are zero"),
        (np.arange(100) - 2, "2 of 100 frequencies are negative"),
        (np.full(100, np.nan), "100 of 100 frequencies are negative, NaN"),
        (np.ones(99), r"shape \[99\], not \[100\]"),
        (np.ones((100, 1)), r"shape \[100, 1\], not \[100\]"),
    ],
)
def test_frequencies_that_cannot_be(frequencies: npt.NDArray[np.float64], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Table.random(n=100).recluster(frequencies=frequencies)


@pytest.mark.parametrize(
    ("dtype", "message"), [(np.int64, "not an unsigned"), (np.uint8, "pass pointer_dtype='uint16'")]
)
def test_pointer_dtypes_that_cannot_be(dtype: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Table.random(n=10, k=257).recluster(dtype=dtype)


def test_every_pointer_dtype() -> None:
    table = Table.random(n=300)
    expected = table.recluster(dtype=np.uint8)
    for dtype in (np.uint16, np.uint32, np.uint64, "uint16"):
        done = table.recluster(dtype=dtype)
        assert done.pointers.dtype == np.dtype(dtype)
        assert_same(done, expected)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.full((3, 2, 10), 10), r"codes 10\.\.10, outside 0\.\.9"),
        (np.full((3, 2, 10), -1), r"codes -1\.\.-1"),
        (np.zeros((3, 10), np.int64), r"not int64 \[3, 2, 10\]"),
        (np.zeros((3, 2, 10), np.int32), "int32"),
    ],
)
def test_codes_that_cannot_be(codes: npt.NDArray[np.int64], message: str) -> None:
    table = Table.random(n=10)
    with pytest.raises(ConfigError, match=f"old_codes returned .*{message}"):
        recluster(
            weights=table.weights,
            num_ids=10,
            old_codes=lambda _: codes,
            new_helper_codes=lambda ids: table.helper_codes[:, ids],
            pointer_dtype=np.uint8,
            seed=0,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": np.zeros((3, 3, 10, 4), np.float32)}, r"not \[c, 2, k, w\]"),
        ({"weights": np.zeros((3, 2, 10, 4))}, "weights are float64"),
        ({"row_states": {"m": np.zeros((3, 2, 9), np.float32)}}, r"row_states\['m'\] are float32 \[3, 2, 9\]"),
        ({"num_ids": 0}, "num_ids=0"),
    ],
)
def test_tables_that_cannot_be(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "weights": np.zeros((3, 2, 10, 4), np.float32),
        "num_ids": 5,
        "old_codes": lambda ids: np.zeros((3, 2, len(ids)), np.int64),
        "new_helper_codes": lambda ids: np.zeros((3, len(ids)), np.int64),
        "pointer_dtype": np.uint8,
        "seed": 0,
    }
    with pytest.raises(ConfigError, match=message):
        recluster(**(arguments | change))


@pytest.mark.parametrize("name", ["points_per_centroid", "num_iterations", "chunk_size", "num_threads"])
def test_config_refuses_what_is_not_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=0"):
        ReclusterConfig(**{name: 0})


def test_config_refuses_another_helper() -> None:
    with pytest.raises(ConfigError, match="helper_init='mean' is not one of"):
        ReclusterConfig(helper_init="mean")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="backend='torch' is not one of"):
        ReclusterConfig(backend="torch")  # type: ignore[arg-type]


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, 300),
    k=st.integers(1, 15),
    cuts=st.lists(st.integers(0, 300), max_size=4),
    residual=st.booleans(),
    weighted=st.booleans(),
)
def test_workers_may_share_columns_and_ranges_as_they_like(
    seed: int, n: int, k: int, cuts: list[int], residual: bool, weighted: bool
) -> None:
    """Each range and each column done by a worker of its own gives the bits of one worker."""
    table = Table.random(n=n, k=k, seed=seed)
    frequencies = np.random.default_rng(seed).integers(1, 9, n) if weighted else None
    config = ReclusterConfig(
        helper_init="residual" if residual else "zero", points_per_centroid=4, num_iterations=3, num_threads=2
    )

    def worker() -> TableClustering:
        return table.clustering(seed=seed, frequencies=frequencies, dtype=np.uint8, **dataclasses.asdict(config))

    trained = [worker().train([column])[0] for column in range(3)]
    centroids = [column.centroids for column in trained]
    pairs = None
    if worker().num_pairs:
        pairs = np.empty(worker().num_pairs, PAIR)
        for start, stop in pairwise(sorted({0, len(pairs), *(7 * cut % len(pairs) for cut in cuts)})):
            worker().nearest_pairs(centroids, start, stop, pairs[start:stop])
    bounds = sorted({0, n, *(cut for cut in cuts if cut < n)})
    pointers = np.empty((n, 3), np.uint8)
    shares = [worker().assign(centroids, start, stop, pointers[start:stop], pairs) for start, stop in pairwise(bounds)]
    done = worker().finish(centroids, np.sum(shares, axis=0))
    expected = table.recluster(dtype=np.uint8, seed=seed, frequencies=frequencies, **dataclasses.asdict(config))
    np.testing.assert_array_equal(pointers, expected.pointers)
    np.testing.assert_array_equal(done.weights, expected.weights)
    for name, state in done.row_states.items():
        np.testing.assert_array_equal(state, expected.row_states[name])
    assert (done.objective, done.share_changed) == (expected.objective, expected.share_changed)
    assert sum_errors(trained) == expected.sample_errors


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, 300),
    k=st.integers(1, 15),
    cuts=st.lists(st.integers(0, 300), max_size=4),
    residual=st.booleans(),
    weighted=st.booleans(),
)
def test_pointers_that_are_given_make_tables_of_their_members(
    seed: int, n: int, k: int, cuts: list[int], residual: bool, weighted: bool
) -> None:
    table = Table.random(n=n, k=k, seed=seed)
    rng = np.random.default_rng(seed)
    frequencies = rng.integers(1, 9, n) if weighted else None
    given_pointers, otherwise = rng.integers(0, k, (3, n)), rng.standard_normal((3, k, 4)).astype(np.float32)
    options = {
        "frequencies": frequencies,
        "helper_init": "residual" if residual else "zero",
        "chunk_size": 1 + seed % 99,
    }
    bounds = list(pairwise(sorted({0, n, *(cut for cut in cuts if cut < n)})))

    def worker() -> TableClustering:
        return table.clustering(dtype=np.uint8, **options)

    def given_of(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return given_pointers[:, ids]

    members = np.sum([worker().sum_members(given_of, *part) for part in bounds], axis=0)
    centroids = worker().member_means(members, otherwise)
    done = worker().finish(centroids, np.sum([worker().adopt(centroids, given_of, *part) for part in bounds], axis=0))
    costs = np.zeros(n)
    for column, pointers in enumerate(given_pointers):
        old = table.embeddings(column).astype(np.float64)
        has_members = np.isin(np.arange(k), pointers)
        expected = np.where(has_members[:, None], members_mean(old, pointers, k), otherwise[column])
        np.testing.assert_allclose(done.weights[column, 0], expected, rtol=1e-6, atol=1e-6)
        costs += np.square(old - expected[pointers]).sum(axis=1)
        h, h_helper = table.codes[column]
        for name, state in table.row_states.items():
            pair_means = (state[column, 0, h].astype(np.float64) + state[column, 1, h_helper]) / 2
            new = done.row_states[name][column, 0]
            np.testing.assert_allclose(new, members_mean(pair_means, pointers, k), rtol=1e-6, atol=1e-12)
        helper = members_mean(old - expected[pointers], table.helper_codes[column], k) if residual else 0
        np.testing.assert_allclose(done.weights[column, 1], np.broadcast_to(helper, (k, 4)), atol=1e-5)
    assert done.objective == pytest.approx(np.average(costs, weights=frequencies), rel=1e-5, abs=1e-9)
    assert done.share_changed == (given_pointers != table.codes[:, 0]).mean()


def test_adopting_what_was_clustered_is_the_clustering() -> None:
    table = Table.random(n=3000, k=30)
    done = table.recluster()
    clustering = table.clustering()

    def pointers(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return done.pointers[ids].T.astype(np.int64)

    centroids = clustering.member_means(clustering.sum_members(pointers, 0, 3000), done.weights[:, 0])
    adopted = clustering.finish(centroids, clustering.adopt(centroids, pointers, 0, 3000))
    # Lloyd's last step assigns; the means of what it assigned are a half step further.
    assert adopted.objective <= done.objective * (1 + 1e-6)
    np.testing.assert_array_equal(adopted.row_states["momentum"], done.row_states["momentum"])
    np.testing.assert_allclose(adopted.weights, done.weights, atol=0.1)


@pytest.mark.parametrize("weighted", [False, True])
def test_errors_of_the_sample(weighted: bool) -> None:
    table = Table.random(n=2000, k=20)
    frequencies = np.random.default_rng(0).integers(1, 9, 2000) if weighted else None
    errors = table.recluster(frequencies=frequencies).sample_errors  # all IDs are in the sample
    weights = np.ones(2000) if frequencies is None else frequencies
    parent = total = 0.0
    for column in range(3):
        old = table.embeddings(column).astype(np.float64)
        total += np.average(np.square(old - np.average(old, axis=0, weights=weights)).sum(axis=1), weights=weights)
        for row in range(20):
            members = table.codes[column, 0] == row
            gaps = old[members] - np.average(old[members], axis=0, weights=weights[members])
            parent += np.square(gaps).sum(axis=1) @ weights[members] / weights.sum()
    assert errors.parent == pytest.approx(parent)
    assert errors.total == pytest.approx(total)
    assert errors.new == pytest.approx(table.recluster(frequencies=frequencies).objective, rel=1e-5)
    assert errors.new < errors.total


def test_a_clustering_of_what_is_clustered_changes_few_pointers() -> None:
    """Embeddings in tight groups, the old pointers naming them: the new ones name them the same."""
    rng = np.random.default_rng(0)
    table = Table.random(n=4000, k=16)
    table.weights[:, 0] = rng.standard_normal((3, 16, 4)) * 10
    table.weights[:, 1] *= 0.01
    table.codes[:, 0] = rng.integers(0, 16, (3, 4000))
    assert table.recluster(num_iterations=50, seed=3).share_changed < 0.35
