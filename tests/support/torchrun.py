"""Runs on two ranks under torchrun, which restarts them whenever one of them dies."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support import runs
from tests.support.launch import Job
from torchrec_cce.training import __main__
from torchrec_cce.training.config import RunConfig


class Torchrun:
    """A run on two ranks that torchrun restarts whenever one of them dies."""

    def __init__(self, folder: Path, config: RunConfig, *options: str, max_restarts: int) -> None:
        self.folder = folder
        toml = runs.write_toml(folder / "run.toml", config)
        elastic = ["--standalone", "--nproc_per_node", "2", "--max-restarts", str(max_restarts)]
        # Forked from a process that has imported everything: a rank that is started again waits for no import.
        elastic += ["--monitor-interval", "0.05", "--start-method", "fork", "--run-path", __main__.__file__]
        arguments = [*elastic, str(toml), "--run-dir", str(folder / "run"), "--quiet", *options]
        self.job = Job(folder / "torchrun", _torchrun, arguments, TORCHREC_CCE_CACHE=str(folder / "cache"))

    def ranks(self) -> list[int]:
        """The process IDs of the ranks that run now."""
        try:
            children = Path(f"/proc/{self.job.pid}/task/{self.job.pid}/children").read_text().split()
        except FileNotFoundError:
            return []
        return [int(pid) for pid in children]

    def wait_for(self, condition: Callable[[], bool], timeout: float = 120) -> bool:
        """Wait for the condition, and return whether it came true before the run ended."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, self.output()
            if not self.job.process.is_alive():
                return False
            time.sleep(0.0005)
        return True

    def kill_a_rank(self, choose: random.Random) -> None:
        pids = self.ranks()
        if pids:
            with suppress(ProcessLookupError):
                os.kill(choose.choice(pids), signal.SIGKILL)
            # Torchrun ends the other one and starts two new ones.
            self.wait_for(lambda: len(self.ranks()) == 2 and not set(self.ranks()) & set(pids))

    def measured(self) -> int:
        """The bytes of metrics so far; a restart drops those after its checkpoint."""
        with suppress(FileNotFoundError):
            return (self.folder / "run" / "metrics.jsonl").stat().st_size
        return 0

    def output(self) -> str:
        return (self.job.folder / "stderr").read_text()[-3000:]


@contextmanager
def torchrun(folder: Path, config: RunConfig, *options: str, max_restarts: int = 0) -> Iterator[Torchrun]:
    """`torchrun -m torchrec_cce.training CONFIG OPTIONS`, with its run in `folder/run`; in the end it must succeed."""
    run = Torchrun(folder, config, *options, max_restarts=max_restarts)
    try:
        yield run
        assert run.job.wait(timeout=300).code == 0, run.output()
    finally:
        for pid in run.ranks():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.job.process.kill()  # which does nothing to one that has ended
        run.job.process.join()


def _torchrun(arguments: list[str]) -> None:
    from torch.distributed.run import main

    # What torchrun does when it is asked to stop is not what its ranks do.
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    main(arguments)
