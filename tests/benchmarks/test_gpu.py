"""The benchmark of GPUs where there is none: that it says so, and that its steps run, on the CPU and small."""

import json

import pytest
import torch

from benchmarks import gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main()
    assert capsys.readouterr().out.startswith("nothing was measured: torch.cuda.is_available() is false")


def test_all_figures_of_a_shape(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("VOCABULARY", [50, 3000]), ("ROUNDS", 1), ("NUM_ROWS", 20), ("COPIED", 1000)):
        monkeypatch.setattr(gpu, name, value)
    cpu = torch.device("cpu")
    gpu.figures(cpu, "no GPU", 16, 32, gpu.bandwidth(cpu))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["figure"].split(",")[0] for line in lines] == [
        *["a step on a GPU"] * 2,
        "forward on a GPU",
        "backward on a GPU",
        "bytes of an ID that cross to a GPU",
    ]
    assert all("no GPU" in line["against"] for line in lines[:4])
