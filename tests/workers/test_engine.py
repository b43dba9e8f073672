"""Engines: what tasks return, raise and share; what is left when workers or their owner are killed."""

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.launch import Job, is_running
from torchrec_cce.errors import ClusteringError, ConfigError, JobError
from torchrec_cce.workers import EngineName, engine_of
from torchrec_cce.workers.engine import TICK_S, Counters, Engine, Shared
from torchrec_cce.workers.inline import InlineEngine
from torchrec_cce.workers.local import LocalEngine


@pytest.fixture(scope="module", params=["local", "ray"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One for all tests of this module that leave it whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHREC_CCE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("RAY_ADDRESS", raising=False)
        with engine_of(request.param, num_workers=2) as engine:
            yield engine


def square(number: int) -> int:
    return number * number


def test_every_task_gets_its_result(engine: Engine) -> None:
    assert engine.num_workers == 2
    assert sorted(engine.run(square, range(20))) == [(i, i * i) for i in range(20)]
    assert list(engine.run(square, [])) == []


def test_tasks_are_taken_as_workers_come_free(engine: Engine) -> None:
    taken = []

    def tasks() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    for done, _ in enumerate(engine.run(square, tasks())):
        assert len(taken) <= done + engine.num_workers


def run_in_a_chain(engine: Engine) -> list[tuple[int, int]]:
    """Four tasks, each known only when the one before has ended."""
    known, done = [1], []

    def tasks() -> Iterator[int | None]:
        while True:
            yield known.pop() if known else None

    for task, result in engine.run(square, tasks()):
        done.append((task, result))
        if task < 4:
            known.append(task + 1)
    return done


def test_tasks_may_depend_on_results(engine: Engine) -> None:
    assert run_in_a_chain(engine) == run_in_a_chain(InlineEngine()) == [(1, 1), (2, 4), (3, 9), (4, 16)]


def looked_at(shared: Shared[dict[str, Any]]) -> tuple[float, bool, list[str], int]:
    value = shared.get()
    array = value["array"]
    return float(array.sum()), array.flags.writeable, value["names"], value["empty"].size


def test_values_are_shared_read_only(engine: Engine) -> None:
    array = np.arange(100_000, dtype=np.float64).reshape(100, -1)
    shared = engine.share({"array": array, "names": ["a"], "empty": np.empty((0, 3)), "odd": b"x" * 3})
    np.testing.assert_array_equal(shared.get()["array"], array)
    for _, (total, writeable, names, size) in engine.run(looked_at, [shared] * 3):
        assert (total, writeable, names, size) == (array.sum(), False, ["a"], 0)


def fail_at_three(number: int) -> int:
    if number == 3:
        raise ClusteringError(f"task {number} holds NaN")
    return number


def test_an_error_is_raised_as_it_was_raised_and_the_engine_goes_on(engine: Engine) -> None:
    with pytest.raises(ClusteringError, match=r"^task 3 holds NaN$"):
        list(engine.run(fail_at_three, range(100)))
    assert list(engine.run(square, [7])) == [(7, 49)]


def threads(_: int) -> tuple[str | None, int]:
    import pyarrow as pa

    return os.environ.get("OMP_NUM_THREADS"), pa.cpu_count()


def test_workers_have_one_thread_for_arithmetic(engine: Engine) -> None:
    before = os.environ.get("OMP_NUM_THREADS")
    assert {result for _, result in engine.run(threads, range(4))} == {("1", 1)}
    assert os.environ.get("OMP_NUM_THREADS") == before


def count_slowly(task: tuple[Counters, int]) -> None:
    counters, start = task
    for number in range(1, 31):
        counters.set(start, number, -number)
        time.sleep(0.1)


def test_numbers_that_tasks_set_are_seen_meanwhile(engine: Engine) -> None:
    """Each task's in steps of its own, and at a bounded rate."""
    counters = engine.counters(4)
    assert counters.read() == [0] * 4
    seen: list[list[int]] = []
    started = time.monotonic()
    for _ in engine.run(count_slowly, [(counters, 0), (counters, 2)], tick=lambda: seen.append(counters.read())):
        pass
    assert 3 <= len(seen) <= (time.monotonic() - started) / TICK_S + 1
    for start in (0, 2):
        assert len({numbers[start] for numbers in seen} - {0}) > 1
        assert all(numbers[start] == -numbers[start + 1] for numbers in seen)
    assert engine.counters(1).read() == [0]


def killed(number: int) -> int:
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def run_into_a_vanished_worker(name: EngineName) -> str:
    with engine_of(name, num_workers=2) as engine, pytest.raises(JobError) as caught:
        list(engine.run(killed, range(20)))
    return str(caught.value)


@pytest.mark.parametrize("name", ["local", "ray"])
def test_a_worker_that_vanishes_is_an_error_that_names_its_task(name: EngineName, tmp_path: Path) -> None:
    job = Job(tmp_path / "job", run_into_a_vanished_worker, name, TORCHREC_CCE_CACHE=str(tmp_path / "cache"))
    assert re.search(r"vanished.*\b5\b.*nothing was chang", job.wait().value)


def test_what_becomes_of_a_task_whose_worker_vanished_is_for_the_caller_to_say(engine: Engine) -> None:
    """The others go on, with as many workers as before."""
    found = dict(engine.run(killed, range(20), lost=lambda number: -number))
    assert found == {number: -5 if number == 5 else number for number in range(20)}
    assert list(engine.run(square, [7])) == [(7, 49)]


def fail_while_others_end(number: int) -> int:
    time.sleep(0.004 if number != 3 else 0)
    return fail_at_three(number)


def fail_often() -> None:
    with engine_of("ray", num_workers=2) as engine:
        for _ in range(8):
            with pytest.raises(ClusteringError):
                list(engine.run(fail_while_others_end, range(100)))
            assert list(engine.run(square, [7])) == [(7, 49)]


def test_an_error_while_other_tasks_end_does_not_end_the_process(tmp_path: Path) -> None:
    """Ray aborts a process that cancels a task at the moment in which it ends, here at one error in three."""
    finished = Job(tmp_path / "job", fail_often).wait()
    assert finished.code == 0, finished.stderr


def die_while_answering(number: int) -> bytes:
    if number == 0:
        return b""
    time.sleep(1.0)
    threading.Timer(0.7, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    return b"x" * (1 << 20)  # more than a pipe takes


def test_a_worker_that_vanishes_in_the_middle_of_an_answer() -> None:
    with engine_of("local", num_workers=2) as engine:
        assert isinstance(engine, LocalEngine)
        answers = engine.run(die_while_answering, [0, 1])
        assert next(answers) == (0, b"")
        while all(worker.process.is_alive() for worker in engine._started):
            time.sleep(0.01)
        with pytest.raises(JobError, match=r"vanished .* while it worked on: 1;"):
            next(answers)
        assert list(engine.run(square, [7])) == [(7, 49)]


def test_a_worker_that_vanishes_while_it_has_no_task_is_replaced() -> None:
    with LocalEngine(1) as engine:
        assert list(engine.run(square, [7])) == [(7, 49)]
        (worker,) = engine._started
        worker.process.kill()
        worker.process.join()
        assert list(engine.run(square, [8])) == [(8, 64)]


def note_terminations(folder: Path, until: int) -> None:
    """A task that ends at the SIGTERM of this number."""
    received = []
    signal.signal(signal.SIGTERM, lambda *_: received.append((folder / f"{len(received) + 1}").touch()))
    (folder / "begun").touch()
    while len(received) < until:
        time.sleep(0.01)
    time.sleep(0.5)
    (folder / "ended").touch()
    raise KeyboardInterrupt


@pytest.mark.parametrize("until", [1, 2])
def test_a_task_that_is_not_wanted_any_more_may_have_time_to_stop(
    tmp_path: Path, until: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is asked once, and killed if it does not listen."""

    def interrupt() -> None:
        if (tmp_path / "begun").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), LocalEngine(1, stopping_s=60 if until == 1 else 2) as engine:
        list(engine.run(partial(note_terminations, tmp_path), [until], tick=interrupt))
    assert {path.name for path in tmp_path.iterdir()} == {"begun", "1", *(["ended"] if until == 1 else [])}
    assert capfd.readouterr().err == ""


def refuse_connections(_: int) -> None:
    raise ConnectionRefusedError("nobody there")


def test_an_error_of_a_connection_is_the_error_of_a_task() -> None:
    with engine_of("local", num_workers=1) as engine, pytest.raises(ConnectionRefusedError, match="nobody there"):
        list(engine.run(refuse_connections, [1]))


@pytest.mark.parametrize(("name", "workers"), [("threads", 1), ("local", 0), ("ray", -1)])
def test_an_engine_that_cannot_be(name: Any, workers: int) -> None:
    with pytest.raises(ConfigError, match=str(name) if name == "threads" else str(workers)):
        engine_of(name, num_workers=workers)


def note_and_sleep(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(60)


def run_sleepers(folder: Path) -> None:
    with engine_of("local", num_workers=2) as engine:
        engine.share(np.ones(1000))
        list(engine.run(note_and_sleep, [folder] * 5))


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_of_a_job_that_is_killed_or_interrupted(tmp_path: Path, signal_number: signal.Signals) -> None:
    notes, cache = tmp_path / "notes", tmp_path / "cache"
    notes.mkdir()
    job = Job(tmp_path / "job", run_sleepers, notes, TORCHREC_CCE_CACHE=str(cache))
    job.wait_for(lambda: len(list(notes.iterdir())) == 2)
    workers = [int(note.name) for note in notes.iterdir()]
    assert all(map(is_running, workers))
    if signal_number == signal.SIGINT:  # as from a terminal: to all processes of the job
        for worker in workers:
            os.kill(worker, signal.SIGINT)
        time.sleep(0.2)
        assert all(map(is_running, workers))  # which is for the job to hear
    os.kill(job.pid, signal_number)
    finished = job.wait(60)
    assert finished.code != 0
    assert ("KeyboardInterrupt" in finished.stderr) == (signal_number == signal.SIGINT)
    deadline = time.monotonic() + 30
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not [path for path in cache.rglob("*") if path.is_file()]
