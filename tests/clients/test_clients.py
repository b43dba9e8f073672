"""Scripts of the kind that users of TorchRec have, each in processes of its own; they assert what they say.

A plain DLRM loop, and one on several ranks with a pipeline and checkpoints, are in `examples/`; `test_examples.py` runs
them.
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.clients import averages, checkpoints, compiled, ddp, keyed_optimizers, loader, pipelines, rec_metrics
from tests.support.launch import on_ranks


def run(folder: Path, main: Callable[..., None], *arguments: Any, world_size: int = 1) -> None:
    for rank in on_ranks(folder, world_size, main, *arguments):
        assert rank.code == 0, rank.stderr


@pytest.mark.parametrize(
    "client", [averages, keyed_optimizers, loader, rec_metrics], ids=lambda client: client.__name__
)
def test_in_one_process(client: ModuleType, tmp_path: Path) -> None:
    run(tmp_path, client.main)


def test_ddp(tmp_path: Path) -> None:
    run(tmp_path, ddp.main, world_size=2)


def test_checkpoints(tmp_path: Path) -> None:
    run(tmp_path, checkpoints.main, tmp_path)


@pytest.mark.parametrize("kind", ["TrainPipelineBase", "TrainPipelineSparseDist", "TrainPipelineSparseDistLite"])
def test_pipelines(kind: str, tmp_path: Path) -> None:
    """The others do not run on a CPU, with stock collections either, but for TrainPipelinePT2: see `test_compiled`."""
    run(tmp_path, pipelines.main, kind)


@pytest.mark.parametrize("kind", ["torch.compile", "TrainPipelinePT2"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.nightly)])
def test_compiled(kind: str, backend: str, tmp_path: Path) -> None:
    run(tmp_path, compiled.main, kind, backend)
