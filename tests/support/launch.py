"""Real processes for tests, forked from a server that has imported our packages: none waits seconds for imports."""

import functools
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

TIMEOUT = 120.0
"""Seconds that a process may take; nothing here hangs longer."""
_PRELOADED = [
    *(f"torchrec_cce.{name}" for name in ("cli.main", "experiments.demo", "training.placement", "training.versions")),
    *("torch.distributed.optim", "torch.utils.tensorboard"),
    *("pytest", "torchrec.datasets.utils", "tests.support.warm"),
]
"""What commands and the functions of tests import when they run, and the kernels that they call."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The result of a process that has ended."""

    code: int
    """Exit status; `-n` after signal n."""
    stdout: str
    stderr: str
    value: Any
    """What the function returned; None if it did not return."""


class Job:
    """A process with its standard streams in files of `folder`."""

    def __init__(self, folder: Path, function: Callable[..., Any], *args: Any, **environment: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.process: BaseProcess = _context().Process(target=_work, args=(folder, environment, function, args))
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def wait(self, timeout: float = TIMEOUT) -> Finished:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"no end within {timeout} s; stderr: {(self.folder / 'stderr').read_text()}")
        value = self.folder / "value"
        return Finished(
            code=self.process.exitcode,
            stdout=(self.folder / "stdout").read_text(),
            stderr=(self.folder / "stderr").read_text(),
            value=pickle.loads(value.read_bytes()) if value.exists() else None,
        )

    def wait_for(self, condition: Callable[[], bool], timeout: float = TIMEOUT) -> None:
        """Until `condition`; the process must still run then."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.is_alive(), (self.folder / "stderr").read_text()
            assert time.monotonic() < deadline, "the condition never came true"
            time.sleep(0.005)


def command(folder: Path, *arguments: str | Path, cwd: Path | None = None, **environment: str) -> Job:
    """`torchrec-cce ARGUMENTS`, run in `cwd` if it is given."""
    return Job(folder, _main, [str(argument) for argument in arguments], cwd, **environment)


def on_ranks(folder: Path, world_size: int, function: Callable[..., Any], *args: Any) -> list[Finished]:
    """Call `function(*args)` on each of `world_size` ranks, with the environment that torchrun gives them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    jobs = [
        Job(folder / f"rank-{rank}", function, *args, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(world_size)
    ]
    return wait_for_all(jobs)


def wait_for_all(jobs: Sequence[Job]) -> list[Finished]:
    """The results of all jobs. If one does not end in time, all of them are killed."""
    try:
        return [job.wait() for job in jobs]
    finally:
        for job in jobs:
            job.process.kill()


def is_running(pid: int) -> bool:
    """Whether there is such a process, other than one that has ended and was not waited for."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@functools.cache
def _context() -> multiprocessing.context.ForkServerContext:
    assert all(map(find_spec, _PRELOADED)), "the fork server would silently pass over a module that is not there"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    # One thread each: several processes share the machine, and sums have the same order in all of them.
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1"):
        forkserver.ensure_running()
    return context


def _work(folder: Path, environment: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell starts in the background
    value = function(*args)
    (folder / "value").write_bytes(pickle.dumps(value))


def _main(arguments: list[str], cwd: Path | None) -> None:
    from torchrec_cce.cli.main import main

    if cwd is not None:
        os.chdir(cwd)
    sys.argv = ["torchrec-cce", *arguments]
    main()
