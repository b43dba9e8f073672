"""Workers end with the process that started them, even if that is killed."""

import os
import signal
import subprocess
import sys
import time

from tests.support.launch import is_running

_PROGRAM = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from torchrec_cce.workers.processes import end_with_parent

def pid(_):
    time.sleep(0.2)  # so that both workers get one
    return os.getpid()

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context, initializer=end_with_parent) as pool:
        print(*pool.map(pid, range(8)), flush=True)
        time.sleep(60)
"""


def test_workers_of_a_parent_that_was_killed_end(tmp_path: os.PathLike[str]) -> None:
    program = os.path.join(tmp_path, "program.py")
    with open(program, "w") as file:
        file.write(_PROGRAM)
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = {int(pid) for pid in parent.stdout.readline().split()}
        assert workers
        assert all(map(is_running, workers))
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)
