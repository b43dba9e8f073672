"""Settings of the whole test suite."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings

# Compiling a kernel in the first example takes longer than any deadline; the examples themselves are repeatable.
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real click logs, or a skip that says so."""
    folder = os.environ.get("TORCHREC_CCE_DATA")
    if not folder:
        pytest.skip("TORCHREC_CCE_DATA is not set: no real click logs to test with")
    return Path(folder)


@pytest.fixture(scope="session")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small log that no test may change."""
    from tests.support import runs

    return runs.write_criteo_log(tmp_path_factory.mktemp("log") / "log.tsv")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped between its two clusterings, with its log beside it; no test may change them."""
    from tests.support import nights

    with _one_thread():
        return nights.train_a_run(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch computes with one thread: on a busy machine, two that wait for each other take ten times as long."""
    with _one_thread():
        yield


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
