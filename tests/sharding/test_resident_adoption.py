"""Moving a model to others' maps in the middle of a phase: residents keep rows, states and embeddings."""

import errno
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
from torch.distributed.checkpoint.state_dict_saver import save

from tests.support.distributed_cases import DIM, Case, rank_batches
from tests.support.launch import on_ranks
from tests.support.resident_models import NUM_ROWS, RATE_OF_ROWS, STEPS, TABLES, Sharded, Table, Tables
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.maps.vocabulary import Vocabulary
from torchrec_cce.methods.residents import ResidentConfig
from torchrec_cce.modules.recluster import TableReport
from torchrec_cce.modules.snapshots import snapshot_of
from torchrec_cce.sharding.distributed_checkpoint import DistributedCheckpoint
from torchrec_cce.sharding.recluster import adopt_sharded
from torchrec_cce.training.parallel import process_group

N = 400
FLOATS = ResidentConfig(fraction=0.4)
INTEGERS = ResidentConfig(fraction=0.4, dtype="int8", learning_rate=RATE_OF_ROWS)
OTHER_IDS = np.random.default_rng(3).permutation(np.append(np.arange(60, N), 10**6 + np.arange(40)))
"""The raw IDs of a vocabulary that lacks some, has some more, and gives all of them other positions."""


def case(way: str, residents: ResidentConfig = FLOATS) -> Case:
    return Case(placement={"user": way, "item": way, "day": way}, residents=residents)


CASES = {
    "by rows": case("row_wise"),
    "on a rank": case("table_wise"),
    "replicated": case("data_parallel"),
    "int8": case("row_wise", INTEGERS),
}


@dataclass(frozen=True, kw_only=True)
class Moves:
    """The tables around a move to maps of the same positions, and around one to maps of others, later in the phase."""

    around: list[tuple[Tables, Tables]]
    reports: list[dict[str, TableReport]]
    losses: list[float]
    last: Tables
    """After a fold."""


def given(trained: Sharded, *, seed: int, keys: npt.NDArray[np.int64] | None = None) -> dict[str, TableSnapshot]:
    """Maps of random pointers, none of them to the last codeword, and codewords that are nothing like the model's."""
    rng = np.random.default_rng(seed)
    found = {}
    for config in trained.collection.cce_configs():
        mine = trained.collection.pointer_map(config.name)
        if keys is not None:
            mine = mine.with_vocabulary(Vocabulary.build(keys, num_threads=1), unseen="hash")
        pointers = rng.integers(0, mine.num_rows - 1, (mine.num_ids, mine.num_columns)).astype(np.uint8)
        made = mine.clustered(pointers, mine.next_helper_hash(seed))
        weights = 7 + rng.random((config.num_physical_rows, DIM // config.num_columns)).astype(np.float32)
        found[config.name] = snapshot_of(config, made, weights=weights)
    return found


def move_on_a_rank(cases: Sequence[Case], folder: Path) -> list[Moves]:
    with process_group() as ranks:
        done = []
        for number, each in enumerate(cases):
            trained = Sharded(each, ranks)
            batches = rank_batches(each, 4 * STEPS, NUM_ROWS)
            trained.admit()
            losses = trained.train(batches[:STEPS])
            trained.fold()
            trained.admit()
            around, reports = [], []
            for move, keys in enumerate((None, OTHER_IDS)):
                losses += trained.train(batches[(1 + move) * STEPS : (2 + move) * STEPS])
                before = trained.tables()
                tables = given(trained, seed=move, keys=keys)
                reports.append(adopt_sharded(trained.model, trained.optimizer, tables))
                around.append((before, trained.tables()))
            losses += trained.train(batches[3 * STEPS :])
            save({"model": trained.model.state_dict()}, checkpoint_id=folder / str(number))
            trained.fold()
            done.append(Moves(around=around, reports=reports, losses=losses, last=trained.tables()))
        return done


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def moves(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, list[Moves]]]:
    """The folder of the checkpoints, one a case, and what each rank saw."""
    folder = tmp_path_factory.mktemp("ranks")
    finished = on_ranks(folder, request.param, move_on_a_rank, list(CASES.values()), folder / "checkpoints")
    for rank in finished:
        assert rank.code == 0, rank.stderr
    by_case = zip(*(rank.value for rank in finished), strict=True)
    return folder / "checkpoints", {name: list(ranks) for name, ranks in zip(CASES, by_case, strict=True)}


def embeddings(
    table: Table, pointer_map: PointerMap, ids: npt.NDArray[np.int64], *, with_rows: bool = True
) -> npt.NDArray[np.float64]:
    """[N, d] of raw IDs that `pointer_map`, that of `table`, may know or not."""
    codes, (c, k) = pointer_map.codes_of_any(ids)[:, 0], (pointer_map.num_columns, pointer_map.num_rows)
    codebook = table.codewords.reshape(c, 2, k, -1)[:, 0].astype(np.float64)
    found = np.concatenate([codebook[column][codes[column]] for column in range(c)], axis=1)
    positions = pointer_map.positions(ids)
    slots = np.full(len(ids), -1)
    slots[positions >= 0] = table.residency.slots.of(positions[positions >= 0])
    if with_rows:
        found[slots >= 0] += table.rows[slots[slots >= 0]]
    return found


def residents(table: Table) -> npt.NDArray[np.int64]:
    """Their raw IDs."""
    return table.pointer_map.raw_ids(np.flatnonzero(table.residency.ages == 0))


@pytest.mark.parametrize("move", [0, 1], ids=["the same positions", "other positions"])
@pytest.mark.parametrize("name", CASES)
def test_residents_keep_their_embeddings(moves: tuple[Path, dict[str, list[Moves]]], name: str, move: int) -> None:
    for rank in moves[1][name]:
        before, after = rank.around[move]
        for table in TABLES:
            old, new = before[table], after[table]
            assert new.residency.is_open
            assert new.residency.phases == old.residency.phases == 2
            known = new.pointer_map.raw_ids(np.arange(new.pointer_map.num_ids))
            had = np.intersect1d(residents(old), known)
            np.testing.assert_array_equal(np.sort(residents(new)), had)
            assert len(had) > 100
            assert (len(had) < len(residents(old))) == (move == 1)
            was, now = (embeddings(each, each.pointer_map, had) for each in (old, new))
            assert np.abs(embeddings(new, new.pointer_map, had, with_rows=False) - was).max() > 0.1
            if name == "int8":
                step = float(new.states_of_rows["step"])
                assert np.abs(now - was).max() <= step * 1.001
                assert np.abs((now - was).mean()) < 4 * step / np.sqrt(12 * now.size)
            else:
                np.testing.assert_allclose(now, was, rtol=0, atol=1e-6)


@pytest.mark.parametrize("move", [0, 1], ids=["the same positions", "other positions"])
@pytest.mark.parametrize("name", CASES)
def test_states_and_ages_stay_with_their_ids(moves: tuple[Path, dict[str, list[Moves]]], name: str, move: int) -> None:
    for rank in moves[1][name]:
        before, after = rank.around[move]
        for table in TABLES:
            old, new = before[table], after[table]
            had = residents(new)
            slots = [each.residency.slots.of(each.pointer_map.positions(had)) for each in (old, new)]
            np.testing.assert_array_equal(*slots)
            for state in old.states_of_rows.keys() - {"rows", "step"}:
                assert old.states_of_rows[state].any()
                np.testing.assert_array_equal(new.states_of_rows[state], old.states_of_rows[state])
            ids = new.pointer_map.raw_ids(np.arange(new.pointer_map.num_ids))
            positions = old.pointer_map.positions(ids)
            expected = np.where(positions >= 0, old.residency.ages[positions], 255)
            np.testing.assert_array_equal(new.residency.ages, expected)
            assert len(np.unique(expected)) > 2


@pytest.mark.parametrize("name", CASES)
def test_codewords_are_means_of_those_that_have_or_had_a_row(
    moves: tuple[Path, dict[str, list[Moves]]], name: str
) -> None:
    """By definition, with numpy; the last codeword, which nobody points at, is the one that is given."""
    for rank in moves[1][name]:
        for (before, after), reports in zip(rank.around, rank.reports, strict=True):
            for table in TABLES:
                old, new = before[table], after[table]
                ids = new.pointer_map.raw_ids(np.arange(new.pointer_map.num_ids))
                were = embeddings(old, old.pointer_map, ids)
                heard = new.residency.ages != 255
                pointers = new.pointer_map.codebook_codes(np.arange(len(ids)))
                c, k = new.pointer_map.num_columns, new.pointer_map.num_rows
                codewords = new.codewords.reshape(c, 2, k, -1)
                assert not codewords[:, 1].any()
                total = 0.0
                for column, part in enumerate(np.split(were, c, axis=1)):
                    for code in range(k):
                        members = heard & (pointers[:, column] == code)
                        if members.any():
                            mean = part[members].mean(axis=0)
                            np.testing.assert_allclose(codewords[column, 0, code], mean, rtol=0, atol=1e-6)
                    assert codewords[column, 0, -1].min() >= 7
                    total += np.square(part - codewords[column, 0][pointers[:, column]]).sum()
                assert reports[table].objective == pytest.approx(total / len(ids), rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_phase_goes_on_to_its_fold(moves: tuple[Path, dict[str, list[Moves]]], name: str) -> None:
    for rank in moves[1][name]:
        assert np.isfinite(rank.losses).all()
        for table in rank.last.values():
            assert not table.residency.is_open
            assert table.pointer_map.generation == 4
            assert np.isfinite(table.codewords).all()


@pytest.mark.parametrize("number", range(len(CASES)))
def test_rows_of_a_checkpoint_are_read_a_part_at_a_time(
    moves: tuple[Path, dict[str, list[Moves]]], tmp_path: Path, number: int
) -> None:
    """From shards by rows, from one rank, from replicas: the matrices that PyTorch reads as a whole."""
    found = DistributedCheckpoint(folder=moves[0] / str(number))
    keys = [key for key, entry in found.tensors.items() if "residents" in key and len(entry.size) == 2]
    assert len(keys) == 2
    for place, key in enumerate(keys):
        rows, expected = found.copy_rows(key, tmp_path / str(place)), found.read([key])[key].numpy()
        assert (rows.dtype, rows.shape) == (expected.dtype, (160, DIM))
        np.testing.assert_array_equal(rows, expected)
        assert rows.any()


def failing_on_a_rank(folders: Sequence[str]) -> list[tuple[str, Tables, Tables]]:
    """With a disk of the second rank that has room for ever more files, until it is enough."""
    rank = int(os.environ["RANK"])
    os.environ["TORCHREC_CCE_CACHE"] = folders[rank]
    found = []
    with process_group() as ranks:
        trained = Sharded(case("row_wise"), ranks)
        trained.admit()
        trained.train(rank_batches(case("row_wise"), STEPS, NUM_ROWS))
        reserve = os.posix_fallocate

        def attempt(room: int) -> str:
            calls = itertools.count(1)

            def running_out(*arguments: Any) -> None:
                if next(calls) > room and rank == 1:
                    raise OSError(errno.ENOSPC, "No space left on device")
                reserve(*arguments)

            tables, before, message = given(trained, seed=1, keys=OTHER_IDS), trained.tables(), ""
            try:
                with mock.patch.object(os, "posix_fallocate", running_out):
                    adopt_sharded(trained.model, trained.optimizer, tables)
            except OSError as error:
                message = f"OSError: {error}"
            found.append((message, before, trained.tables()))
            return message

        for room in range(20):
            if not attempt(room):
                return found
    raise AssertionError("the disk was always full")


def test_an_error_on_one_rank_is_raised_on_all_and_changes_nothing(tmp_path: Path) -> None:
    folders = [str(tmp_path / f"host-{host}") for host in range(2)]
    for rank in on_ranks(tmp_path, 2, failing_on_a_rank, folders):
        assert rank.code == 0, rank.stderr
        *failed, (message, before, after) = rank.value
        assert (message, before["user"].pointer_map.generation, after["user"].pointer_map.generation) == ("", 0, 1)
        assert len(failed) >= 6, "rows as they were, keys, ages, order, rows as they are"
        for message, before, after in failed:
            assert message.startswith("OSError: [Errno 28] No space left on device")
            for name, table in before.items():
                assert after[name].pointer_map.digest == table.pointer_map.digest
                assert after[name].rows.tobytes() == table.rows.tobytes()
                assert after[name].codewords.tobytes() == table.codewords.tobytes()
                np.testing.assert_array_equal(after[name].residency.ages, table.residency.ages)
    assert not [path for path in tmp_path.rglob("live/*") if path.is_file()]
