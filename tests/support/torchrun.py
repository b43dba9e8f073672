"""Runs on two ranks under torchrun, which restarts them whenever one of them dies."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support import runs
from torchrec_cce.training.config import RunConfig


class Torchrun:
    """A run on two ranks that torchrun restarts whenever one of them dies."""

    def __init__(self, folder: Path, config: RunConfig, *, max_restarts: int) -> None:
        self.folder = folder
        toml = runs.write_toml(folder / "run.toml", config)
        arguments = ["--standalone", "--nproc_per_node", "2", "--max-restarts", str(max_restarts)]
        arguments += ["--monitor-interval", "0.05", "-m", "torchrec_cce.training", str(toml)]
        arguments += ["--run-dir", str(folder / "run"), "--restartable", "--quiet"]
        environment = {**os.environ, "TORCHREC_CCE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        with (folder / "output").open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", *arguments],
                stdout=output,
                stderr=output,
                env=environment,
            )

    def ranks(self) -> list[int]:
        """The process IDs of the ranks that run now."""
        try:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        except FileNotFoundError:
            return []
        return [int(pid) for pid in children]

    def wait_for(self, condition: Callable[[], bool], timeout: float = 120) -> bool:
        """Wait for the condition, and return whether it came true before the run ended."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, (self.folder / "output").read_text()[-3000:]
            if self.process.poll() is not None:
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


@contextmanager
def torchrun(folder: Path, config: RunConfig, *, max_restarts: int) -> Iterator[Torchrun]:
    run = Torchrun(folder, config, max_restarts=max_restarts)
    try:
        yield run
        assert run.process.wait(timeout=300) == 0, (folder / "output").read_text()[-3000:]
    finally:
        for pid in run.ranks():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.process.kill()  # which does nothing to one that has ended
        run.process.wait()
