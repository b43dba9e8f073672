"""Residents under sharding: several ranks train, admit and fold as one process does."""

import errno
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from tests.support.distributed_cases import Case, global_batches, part_of, rank_batches
from tests.support.launch import Finished, on_ranks
from tests.support.parity import mean_over_ranks
from tests.support.resident_models import (
    NUM_ROWS,
    RATE_OF_ROWS,
    STEPS,
    STRETCHES,
    TABLES,
    Alone,
    Outcome,
    Sharded,
    Tables,
    train,
    train_with_arrivals,
)
from torchrec_cce import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig, CCEEmbeddingCollection, CCEEmbeddingConfig
from torchrec_cce.errors import CCEError, ConfigError
from torchrec_cce.methods.residents import ResidentConfig
from torchrec_cce.sharding.admit import admit_sharded
from torchrec_cce.sharding.frequencies import ShardedFrequencies
from torchrec_cce.sharding.pipeline import drain
from torchrec_cce.sharding.recluster import recluster_sharded
from torchrec_cce.sharding.tables import collections_of
from torchrec_cce.training import checkpoint
from torchrec_cce.training.checkpoint import CheckpointWriter
from torchrec_cce.training.parallel import Ranks, process_group
from torchrec_cce.training.schedule import Position

TOLERANCE = 1e-6

FLOATS = ResidentConfig(fraction=0.4)
INTEGERS = ResidentConfig(fraction=0.4, dtype="int8", learning_rate=RATE_OF_ROWS)
# With another rate, the last bits of a gradient, which ranks sum in another order, decide how a number is rounded.
INTEGERS_IN_SEQUENCES = ResidentConfig(fraction=0.4, dtype="int8", learning_rate=0.25)
HALVES = ResidentConfig(fraction=0.4, dtype="float16", learning_rate=RATE_OF_ROWS)
ROUNDED = 4
"""Float16 numbers of a table whose rounding they may decide: their roundings are fine, and most of them happen."""


def case(way: str, residents: ResidentConfig = FLOATS, **changes: Any) -> Case:
    """With the tables, and the rows of their residents, all placed in one way."""
    return Case(placement={"user": way, "item": way, "day": way}, residents=residents, **changes)


CASES = {
    "by rows, sums": case("row_wise"),
    "by rows, means": case("row_wise", pooling="mean"),
    "on a rank, sums and means": case("table_wise", pooling="sum and mean"),
    "on a rank, weighted": case("table_wise", pooling="weighted"),
    "on a rank, a variable batch": case("table_wise", form="variable"),
    "by rows, a variable batch": case("row_wise", form="variable, even"),
    "replicated, means": case("data_parallel", pooling="mean"),
    "replicated, by SGD": case("data_parallel", optimizer="sgd"),
    "pointers of 4 bits": case("row_wise", min_pointer_bits=4),
    "int8, by rows, sums and means": case("row_wise", INTEGERS, pooling="sum and mean"),
    "int8, replicated, weighted": case("data_parallel", INTEGERS, pooling="weighted"),
    "int8, on a rank, a variable batch": case("table_wise", INTEGERS, form="variable"),
    "sequences, by rows, a variable batch": case("row_wise", in_sequences=True, form="variable"),
    "sequences, on a rank": case("table_wise", in_sequences=True),
    "sequences, replicated": case("data_parallel", in_sequences=True),
    "sequences, float16, on a rank, a variable batch": case("table_wise", HALVES, in_sequences=True, form="variable"),
    "sequences, int8, by rows": case("row_wise", INTEGERS_IN_SEQUENCES, in_sequences=True),
}


def on_a_rank(cases: Sequence[Case], folders: Sequence[str]) -> list[Outcome]:
    """Train every case; ranks with different `folders`, in turn, are as if on different hosts."""
    os.environ["TORCHREC_CCE_CACHE"] = folders[int(os.environ["RANK"]) % len(folders)]
    with process_group() as ranks:
        return [train(Sharded(case, ranks), rank_batches(case, STRETCHES * STEPS, NUM_ROWS)) for case in cases]


@pytest.fixture(scope="module")
def alone() -> dict[str, Outcome]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {
            name: train(
                Alone(case),
                [
                    part_of(batch, rank=0, world_size=1, num_rows=NUM_ROWS)
                    for batch in global_batches(case, STRETCHES * STEPS)
                ],
            )
            for name, case in CASES.items()
        }
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[(2, 1), (3, 2)], ids=["two ranks", "three ranks on two hosts"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    world_size, hosts = request.param
    folder = tmp_path_factory.mktemp("ranks")
    folders = [str(folder / f"host-{host}") for host in range(hosts)]
    outcomes = values(on_ranks(folder, world_size, on_a_rank, list(CASES.values()), folders))
    assert not [path for path in folder.rglob("live/*") if path.is_file()], "no file outlives its maps"
    return dict(zip(CASES, zip(*outcomes, strict=True), strict=True))


def values(finished: Sequence[Finished]) -> list[Any]:
    for rank in finished:
        assert rank.code == 0, rank.stderr
    return [rank.value for rank in finished]


@pytest.mark.parametrize("name", CASES)
def test_ranks_train_as_one_process_does(name: str, ranks: dict[str, list[Outcome]], alone: dict[str, Outcome]) -> None:
    expected = alone[name]
    assert expected.losses[-1] < 0.9 * expected.losses[0]
    is_rounded = CASES[name].residents is HALVES
    tolerance = 1e-4 if is_rounded else TOLERANCE
    for found in ranks[name]:
        np.testing.assert_allclose(found.losses, expected.losses, rtol=tolerance, atol=tolerance)
        for theirs, ours in zip(found.changes, expected.changes, strict=True):
            (assert_close_but_for_roundings if is_rounded else assert_close)(theirs.after, ours.after)
        (assert_close_but_for_roundings if is_rounded else assert_close)(found.last, expected.last)


def assert_close_but_for_roundings(found: Tables, expected: Tables) -> None:
    for name, table in expected.items():
        assert found[name].pointer_map.digest == table.pointer_map.digest
        np.testing.assert_allclose(found[name].rows, table.rows, rtol=2**-10, atol=2**-14)
        assert (np.abs(found[name].rows - table.rows) > TOLERANCE).sum() <= ROUNDED
        np.testing.assert_allclose(found[name].codewords, table.codewords, rtol=0, atol=1e-4)


def assert_close(found: Tables, expected: Tables) -> None:
    for name, table in expected.items():
        assert found[name].pointer_map.digest == table.pointer_map.digest
        np.testing.assert_array_equal(found[name].residency.ages, table.residency.ages)
        np.testing.assert_array_equal(found[name].residency.order, table.residency.order)
        assert found[name].residency.is_open == table.residency.is_open
        np.testing.assert_allclose(found[name].codewords, table.codewords, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(found[name].rows, table.rows, rtol=0, atol=TOLERANCE)
        # Adagrad's steps hardly depend on the scale of gradients, but its sums do.
        for state in found[name].states_of_rows.keys() & table.states_of_rows.keys():
            theirs, ours = found[name].states_of_rows[state], table.states_of_rows[state]
            np.testing.assert_allclose(theirs.reshape(-1), ours.reshape(-1), rtol=1e-5, atol=TOLERANCE, err_msg=state)


@pytest.mark.parametrize("name", CASES)
def test_a_change_gives_the_bits_of_one_process(name: str, ranks: dict[str, list[Outcome]]) -> None:
    """An admission and a fold, from the very rows and codewords that the ranks had."""
    one = Alone(CASES[name])
    first = ranks[name][0]
    assert [change.is_fold for change in first.changes] == [False, True, False, True]
    for number, change in enumerate(first.changes):
        one.take_over(change.before)
        (one.fold if change.is_fold else one.admit)()
        expected = one.tables()
        for rank in ranks[name]:
            assert_same_bits(rank.changes[number].after, expected)


def assert_same_bits(found: Tables, expected: Tables) -> None:
    for name, table in expected.items():
        assert found[name].pointer_map.digest == table.pointer_map.digest
        assert found[name].pointer_map.generation == table.pointer_map.generation
        assert found[name].residency.ages.tobytes() == table.residency.ages.tobytes()
        assert found[name].residency.phases == table.residency.phases
        assert found[name].residency.is_open == table.residency.is_open
        assert found[name].codewords.tobytes() == table.codewords.tobytes()
        assert found[name].rows.tobytes() == table.rows.tobytes()
        for theirs, ours in ((found[name].states, table.states), (found[name].states_of_rows, table.states_of_rows)):
            assert theirs.keys() == ours.keys()
            for state in ours:
                assert theirs[state].tobytes() == ours[state].tobytes(), state


@pytest.mark.parametrize("name", CASES)
def test_every_phase_has_trained_its_rows_alone(name: str, ranks: dict[str, list[Outcome]]) -> None:
    """A comparison of what never moved would prove nothing."""
    for rank in ranks[name]:
        for admitted, folded in zip(rank.changes[::2], rank.changes[1::2], strict=True):
            for table in TABLES:
                was, became = admitted.after[table], folded.before[table]
                assert became.codewords.tobytes() == was.codewords.tobytes()
                assert (became.rows != was.rows).any(axis=1).sum() > 10
                assert became.residency.is_open
                assert (folded.after[table].codewords != became.codewords).any()
        for table in TABLES:
            assert (rank.last[table].codewords != rank.changes[-1].after[table].codewords).any()
            assert not rank.last[table].residency.is_open


# Arrivals

COMING = [
    case("row_wise", replace(FLOATS, first_come=True)),
    case("table_wise", replace(FLOATS, first_come=True, newcomers=0.8), pooling="sum and mean"),
    case("data_parallel", replace(INTEGERS, first_come=True)),
]


def come_to_ranks(folders: Sequence[str]) -> list[tuple[list[float], list[Tables]]]:
    os.environ["TORCHREC_CCE_CACHE"] = folders[int(os.environ["RANK"])]
    with process_group() as ranks:
        return [
            train_with_arrivals(Sharded(case, ranks), rank_batches(case, STRETCHES * STEPS, NUM_ROWS))
            for case in COMING
        ]


def test_ids_come_to_ranks_as_to_one_process(tmp_path: Path) -> None:
    """Before each of three stretches: the rows of those who were there go on learning."""
    folders = [str(tmp_path / f"host-{host}") for host in range(2)]
    ranks = values(on_ranks(tmp_path, 2, come_to_ranks, folders))
    for number, case in enumerate(COMING):
        batches = [
            part_of(batch, rank=0, world_size=1, num_rows=NUM_ROWS) for batch in global_batches(case, STRETCHES * STEPS)
        ]
        losses, tables = train_with_arrivals(Alone(case), batches)
        for name in TABLES:
            had = [np.flatnonzero(each[name].residency.ages == 0) for each in tables[:STRETCHES]]
            assert 50 < len(had[0]) < len(had[1]) < len(had[2]) == 160
            (first, *_, last), slots = tables, [each[name].residency.slots.of(had[0]) for each in tables[:STRETCHES]]
            assert (slots[0] == slots[1]).all()
            assert (slots[0] == slots[2]).all()
            assert (first[name].rows[slots[0]] != tables[2][name].rows[slots[0]]).any(axis=1).sum() > 10
            assert not last[name].residency.is_open
        for rank in ranks:
            found_losses, found = rank[number]
            np.testing.assert_allclose(found_losses, losses, rtol=TOLERANCE, atol=TOLERANCE)
            for theirs, ours in zip(found, tables, strict=True):
                assert_close(theirs, ours)
    assert not [path for path in tmp_path.rglob("live/*") if path.is_file()]


# Errors


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def poison(trained: Sharded, ranks: Ranks) -> None:
    """Put NaN into a row of the second table on the last rank, where that has one."""
    value: Any = trained.model.state_dict()["collection.residents.embedding_bags.item_residents.weight"]
    if ranks.rank == ranks.world_size - 1:
        with torch.no_grad():
            part = value.local_shards()[0].tensor if hasattr(value, "local_shards") else value
            part[-1] = torch.nan


def failing_on_a_rank(folders: Sequence[str]) -> dict[str, tuple[str, Tables, Tables]]:
    """Fault → the error, and the tables before and after it."""
    rank = int(os.environ["RANK"])
    os.environ["TORCHREC_CCE_CACHE"] = folders[rank]
    found = {}
    with process_group() as ranks:

        def attempt(name: str, trained: Sharded, change: Any) -> None:
            before, message = trained.tables(), ""
            try:
                change()
            except (CCEError, OSError) as error:
                message = f"{type(error).__name__}: {error}"
            found[name] = message, before, trained.tables()

        def with_a_full_disk(change: Any) -> None:
            reserve = os.posix_fallocate
            if rank == 1:
                os.posix_fallocate = no_space
            try:
                change()
            finally:
                os.posix_fallocate = reserve

        for way in ("row_wise", "data_parallel"):
            trained = Sharded(case(way), ranks)
            trained.admit()
            trained.train(rank_batches(case(way), STEPS, NUM_ROWS))
            if way == "row_wise":
                attempt("a full disk at a fold", trained, lambda: with_a_full_disk(trained.fold))  # noqa: B023
                attempt("a phase in a phase", trained, trained.admit)
            poison(trained, ranks)
            attempt(f"a bad row, {way}", trained, trained.fold)
        for residents in (FLOATS, INTEGERS):
            trained = Sharded(case("row_wise", residents), ranks)
            attempt(
                f"a full disk at an admission, {residents.dtype}",
                trained,
                lambda: with_a_full_disk(trained.admit),  # noqa: B023
            )
            bad = {"item": np.ones(399 if rank == 0 else 400, np.int64)}
            attempt(
                f"bad frequencies, {residents.dtype}",
                trained,
                lambda: admit_sharded(trained.model, trained.optimizer, seed=3, frequencies=bad),  # noqa: B023
            )
        attempt(
            "an unknown table",
            trained,
            lambda: admit_sharded(trained.model, trained.optimizer, seed=3, frequencies={"day": np.ones(7, np.int64)}),
        )
        without = Sharded(Case(placement={"user": "row_wise", "item": "row_wise", "day": "row_wise"}), ranks)
        with pytest.raises(ConfigError, match="no table has residents"):
            admit_sharded(without.model, without.optimizer, seed=3)
    return found


def test_an_error_on_one_rank_is_raised_on_all_and_changes_nothing(tmp_path: Path) -> None:
    folders = [str(tmp_path / f"host-{host}") for host in range(2)]
    ranks = values(on_ranks(tmp_path, 2, failing_on_a_rank, folders))
    bad_row = "ClusteringError: table 'item': the codewords or the rows of residents hold NaN or infinite values"
    expected = {
        "a full disk at a fold": "OSError: [Errno 28] No space left on device",
        "a phase in a phase": "ConfigError: a phase of residents is open; recluster first",
        "a bad row, row_wise": bad_row,
        "a bad row, data_parallel": bad_row,
        "an unknown table": "ConfigError: frequencies of ['day'], which are not CCE tables; those are: item, user",
        **{
            f"{fault}, {dtype}": message
            for dtype in ("float32", "int8")
            for fault, message in (
                ("a full disk at an admission", "OSError: [Errno 28] No space left on device"),
                ("bad frequencies", "ConfigError: frequencies are int64 [399], not integers [400], one an ID"),
            )
        },
    }
    for found in ranks:
        assert found.keys() == expected.keys()
        for fault, message in expected.items():
            raised, before, after = found[fault]
            assert raised.startswith(message), fault
            assert_same_bits(after, before)
    assert not [path for path in tmp_path.rglob("live/*") if path.is_file()]


# Several collections, and pipelines


class Several(nn.Module):
    """Collections with residents and without."""

    def __init__(self) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"num_embeddings": 100, "embedding_dim": 16, "num_rows": 9}
        self.plain = CCEEmbeddingBagCollection(tables=[CCEEmbeddingBagConfig(name="plain", **sizes)])
        self.words = CCEEmbeddingCollection(tables=[CCEEmbeddingConfig(name="word", **sizes)])
        self.resident = CCEEmbeddingBagCollection(
            tables=[CCEEmbeddingBagConfig(name="t", residents=ResidentConfig(), **sizes)]
        )


def admit_in_several_collections() -> list[tuple[bool, int]]:
    """Of the collections with residents: whether a phase is open, and how many there were."""
    with process_group() as ranks:
        model = DistributedModelParallel(Several(), device=ranks.device)
        admit_sharded(model, model.fused_optimizer, seed=0)
        recluster_sharded(model, model.fused_optimizer, seed=0)
        admit_sharded(model, model.fused_optimizer, seed=0)
        return [
            (collection.remap.phase_is_open, collection.remap.residency(table).phases)
            for collection in collections_of(model).values()
            for table in collection.remap.resident_tables()
        ]


def test_collections_without_residents_may_stand_beside(tmp_path: Path) -> None:
    assert values(on_ranks(tmp_path, 2, admit_in_several_collections)) == [[(True, 2)]] * 2


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_sequences_go_on_from_a_checkpoint_in_a_phase(tmp_path: Path, dtype: str) -> None:
    """Rows, who has them, and the state of the optimizers, to the last bit."""
    chosen = case("row_wise", ResidentConfig(fraction=0.4, dtype=dtype), in_sequences=True)
    with process_group() as ranks:
        one, other = Sharded(chosen, ranks), Sharded(chosen, ranks)
        batches = rank_batches(chosen, 2 * STEPS, NUM_ROWS)
        one.admit()
        one.train(batches[:STEPS])
        CheckpointWriter(tmp_path).save(one.model, one.optimizer, Position(), ShardedFrequencies({}))
        checkpoint.load(tmp_path, other.model, other.optimizer)
        assert other.collection.phase_is_open
        assert one.train(batches[STEPS:]) == other.train(batches[STEPS:])
        assert_same_bits(other.tables(), one.tables())
        for each in (one, other):
            each.fold()
        assert_same_bits(other.tables(), one.tables())


def pipelined_on_a_rank(cases: Sequence[Case]) -> list[tuple[Outcome, Outcome, int]]:
    """Case → the outcomes of plain and of pipelined training, and how many batches were drained."""
    found = []
    with process_group() as ranks:
        for case in cases:
            batches = rank_batches(case, STRETCHES * STEPS, NUM_ROWS)
            plain = train(Remapped(case, ranks), batches)
            pipelined = Pipelined(case, ranks)
            found.append((plain, train(pipelined, batches), pipelined.drained))
    return found


class Remapped(Sharded):
    """Given rows, as a pipeline gives them: in a mean, the last bits of raw IDs' embeddings may differ."""

    def train(self, batches: Sequence[Batch]) -> list[float]:
        return super().train(
            [replace(batch, sparse_features=self.collection.remap(batch.sparse_features)) for batch in batches]
        )


class Pipelined(Sharded):
    """In a pipeline that remaps ahead of the model, and is drained at the end of every stretch."""

    def __init__(self, case: Case, ranks: Ranks) -> None:
        super().__init__(case, ranks)
        self.pipeline = TrainPipelineSparseDist(self.model, self.optimizer, ranks.device, pipeline_postproc=True)
        self.drained = 0

    def train(self, batches: Sequence[Batch]) -> list[float]:
        iterator = iter([*batches, *batches])
        losses = [self.pipeline.progress(iterator) for _ in range(len(batches) - 2)]
        for change in (self.fold, self.admit):
            with pytest.raises(ConfigError, match="is in a training pipeline that has batches in flight"):
                change()
        rest = drain(self.pipeline)
        self.drained += len(rest)
        return [mean_over_ranks(loss) for loss in [*losses, *rest]]


PIPELINED = [
    CASES["by rows, means"],
    CASES["replicated, by SGD"],
    CASES["int8, by rows, sums and means"],
    case("row_wise", in_sequences=True),
    CASES["sequences, int8, by rows"],
]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_pipeline_that_is_drained_gives_the_bits_of_plain_training(tmp_path: Path, world_size: int) -> None:
    for rank in values(on_ranks(tmp_path, world_size, pipelined_on_a_rank, PIPELINED)):
        for plain, pipelined, drained in rank:
            assert drained == 2 * STRETCHES
            assert pipelined.losses == plain.losses
            for found, expected in zip(pipelined.changes, plain.changes, strict=True):
                assert_same_bits(found.after, expected.after)
            assert_same_bits(pipelined.last, plain.last)
