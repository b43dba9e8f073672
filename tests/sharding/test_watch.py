"""The watcher of a registry: ranks move together whatever happens to one of them, in a pipeline too."""

import errno
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.support import pipelines
from tests.support.launch import on_ranks
from tests.support.sharded_models import Both, sharded
from torchrec_cce import CCEEmbeddingBagCollection
from torchrec_cce.errors import MapFileError, RegistryError
from torchrec_cce.maps.journal import RegistryState
from torchrec_cce.maps.registry import MapVersion, Registry
from torchrec_cce.sharding import watch
from torchrec_cce.sharding.pipeline import drain
from torchrec_cce.sharding.tables import collections_of
from torchrec_cce.sharding.watch import VersionWatcher
from torchrec_cce.training.parallel import process_group


def test_a_look_from_before_a_publication_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was current then would be taken for a step back."""
    begun: list[tuple[Callable[[], Any], Future[Any]]] = []

    def held(function: Callable[[], Any]) -> Future[Any]:
        begun.append((function, Future()))
        return begun[-1][1]

    monkeypatch.setattr(watch, "_in_background", held)
    nothing: Any = None
    with process_group():
        watcher = VersionWatcher(Registry(tmp_path / "registry"), version=1)
        watcher.adopt_current(nothing, nothing)
        watcher.published(2)
        begun[0][1].set_result(watch._Look(1, is_own=False))
        for _ in range(3):
            watcher.adopt_current(nothing, nothing)
        assert [function for function, _ in begun] == [watcher._see] * 2, "two looks, and nothing is opened"


class Troubled(Registry):
    """Does to some ranks what stores and disks do."""

    hangs: threading.Event | None = None
    trouble: list[Exception]
    """Of the next calls of `open`."""
    silence: list[Exception]
    """Of the next calls of `state`."""

    def state(self) -> RegistryState:
        if self.silence:
            raise self.silence.pop(0)
        return super().state()

    def open(self, version: int | None = None, **options: Any) -> MapVersion:
        if self.hangs is not None:
            self.hangs.wait()
        if self.trouble:
            raise self.trouble.pop(0)
        return super().open(version, **options)


def follow_in_trouble(folder: Path, name: str) -> tuple[list[tuple[int, str | None]], int, bool]:
    """What the watcher of this rank answered, how often it was asked, and whether the model is at the version."""
    with process_group() as ranks:
        model, optimizer = sharded(Both())
        registry = Troubled(folder / "registry", cache=folder / "cache")
        registry.trouble, registry.silence = [], []
        full = OSError(errno.ENOSPC, "No space left on device")
        if name == "a full disk on the last rank" and ranks.rank == ranks.world_size - 1:
            registry.trouble = [full, full]
        if name == "damage on the last rank" and ranks.rank == ranks.world_size - 1:
            registry.trouble = [MapFileError("0000.pointers.arrow: damaged")]
        if name == "a store that does not answer" and ranks.is_first:
            registry.silence = [RegistryError("no answer")] * 3
        if name == "the last rank hangs" and ranks.rank == ranks.world_size - 1:
            registry.hangs = threading.Event()
        answers = []
        watch._PATIENCE_S = 0.2
        deadline = time.monotonic() + 60
        asked = 0
        with VersionWatcher(registry) as watcher:
            while not (answers and answers[-1].error is None) and asked < 100:
                answer = watcher.adopt_current(model, optimizer)
                answers.extend([] if answer is None else [answer])
                asked += 1
                time.sleep(0.02)
                assert time.monotonic() < deadline
        versions = {
            one.pointer_map(table).version for one in collections_of(model).values() for table in one.cce_tables()
        }
        return [(one.version, one.error) for one in answers], asked, versions == {1}


@pytest.mark.parametrize(
    ("name", "expected", "moves", "warnings"),
    [
        ("nothing", [(1, None)], True, ""),
        ("a full disk on the last rank", [(1, "[Errno 28] No space left on device"), (1, None)], True, "[Errno 28]"),
        ("damage on the last rank", [(1, "0000.pointers.arrow: damaged")], False, "does not move to version 1"),
        ("a store that does not answer", [(1, None)], True, "no news from the registry, training goes on: no answer"),
        ("the last rank hangs", [], False, ""),
    ],
)
def test_in_trouble(
    tmp_path: Path, name: str, expected: list[tuple[int, str | None]], moves: bool, warnings: str
) -> None:
    model = Both()
    reports = {**model.bags.recluster(seed=1), **model.sequences.recluster(seed=1)}
    tables = {**model.bags.snapshot(reports), **model.sequences.snapshot(reports)}
    Registry(tmp_path / "registry", cache=tmp_path / "cache").publish(tables)
    ranks = on_ranks(tmp_path / "ranks", 2, follow_in_trouble, tmp_path, name)
    for rank in ranks:
        assert rank.code == 0, rank.stderr
        answers, asked, moved = rank.value
        assert (answers, moved) == (expected, moves)
        assert asked == 100 or moves
        assert rank.stderr.count("version 1") <= 1
    assert ranks[0].stderr.count(warnings) == 1 or not warnings


def move_in_the_middle(way: str, folder: Path) -> pipelines.Trained:
    """Six batches, a move, and six more; in a pipeline two of the first six are in flight when the move is due."""
    device = pipelines.join("cpu", 2)
    batches = pipelines.rank_batches(pipelines.CASE, pipelines.STEPS)
    trainer = pipelines.Trainer(device, 2)
    registry = Registry(folder / "registry", cache=folder / "cache")
    stream = iter(batches)

    def progress(times: int) -> None:
        for _ in range(times):
            loss, *_ = trainer.pipeline.progress(stream)
            trainer.losses.append(pipelines.mean_over_ranks(loss))

    def drained(_: MapVersion) -> None:
        rest: list[Any] = drain(trainer.pipeline)
        trainer.losses += [pipelines.mean_over_ranks(loss) for loss, *_ in rest]

    with VersionWatcher(registry) as watcher:
        if way == "plain":
            trainer.plainly(batches[:6])
        else:
            progress(4)
        moved = None
        while moved is None:
            moved = watcher.adopt_current(trainer.model, trainer.optimizer, before=drained)
        assert moved.error is None
        if way == "plain":
            trainer.plainly(batches[6:])
        else:
            progress(4)
            drained(None)  # type: ignore[arg-type]
    maps = {table: trainer.collection.pointer_map(table).identity for table in trainer.collection.cce_tables()}
    outcome = pipelines.outcome_of(pipelines.CASE, trainer.model, trainer.optimizer, trainer.losses)
    dist.destroy_process_group()
    return pipelines.Trained(outcome=outcome, maps=maps, evaluated=[])


def test_in_a_pipeline_of_ones_own(tmp_path: Path) -> None:
    """As without a pipeline, bit for bit, if the batches in flight are trained before the move."""
    collection = CCEEmbeddingBagCollection(tables=pipelines.CASE.tables())
    registry = Registry(tmp_path / "registry", cache=tmp_path / "cache")
    registry.publish(collection.snapshot(collection.recluster(seed=1)))
    ways = ("plain", "pipelined")
    done = {way: on_ranks(tmp_path / way, 2, move_in_the_middle, way, tmp_path) for way in ways}
    for ranks in done.values():
        for rank in ranks:
            assert rank.code == 0, rank.stderr
    for plain, pipelined in zip(*done.values(), strict=True):
        assert plain.value.maps == pipelined.value.maps
        assert all(identity.startswith("version 1, generation 1") for identity in plain.value.maps.values())
        assert len(plain.value.outcome.losses) == pipelines.STEPS
        assert max(pipelined.value.outcome.deviation(plain.value.outcome).values()) == 0
