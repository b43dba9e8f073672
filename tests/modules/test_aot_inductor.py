"""A DLRM with CCE tables as a package of AOTInductor: the same scores, where our package cannot be imported."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim
from torchrec import KeyedJaggedTensor
from torchrec.models.dlrm import DLRM

from tests.support.module_cases import cce, full, random_features
from torchrec_cce import CCEEmbeddingBagCollection

SCORES = """
import sys
for name in ("torchrec_cce", "numba", "pyarrow", "torchrec"):
    sys.modules[name] = None
import fbgemm_gpu, torch
package, inputs, scores = sys.argv[1:]
run = torch._inductor.aoti_load_package(package)
batches = torch.load(inputs)
torch.save([run(*batch) for batch in batches], scores)
batches[0][1][0] = 1000
try:
    run(*batches[0])
except Exception as error:
    print(error)
"""


class OfTensors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        collection = CCEEmbeddingBagCollection(tables=[cce(), full()])
        collection.recluster(seed=1)
        self.dlrm = DLRM(collection, dense_in_features=5, dense_arch_layer_sizes=[8, 16], over_arch_layer_sizes=[8, 1])

    def forward(self, dense: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.dlrm(dense, KeyedJaggedTensor(["user", "day"], values, lengths=lengths.flatten()))
        return scores


def batch(size: int, seed: int) -> tuple[torch.Tensor, ...]:
    ids = random_features({"user": 1000, "day": 7}, size, 3, seed=seed)
    dense = torch.randn(size, 5, generator=torch.Generator().manual_seed(seed))
    return dense, ids.values(), ids.lengths().view(2, size)


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles C++")
def test_a_package_runs_without_this_package(tmp_path: Path) -> None:
    model = OfTensors().eval()
    size = Dim("size", min=2, max=4096)
    dynamic = {"dense": {0: size}, "values": {0: Dim.AUTO}, "lengths": {1: size}}
    with torch.no_grad():
        program = torch.export.export(model, batch(20, seed=0), dynamic_shapes=dynamic)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "dlrm.pt2"))
        batches = [batch(20, seed=1), batch(7, seed=2)]
        expected = [model(*each) for each in batches]
    torch.save(batches, tmp_path / "inputs")
    command = [sys.executable, "-c", SCORES, package, str(tmp_path / "inputs"), str(tmp_path / "scores")]
    printed = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True)
    for found, scores in zip(torch.load(tmp_path / "scores"), expected, strict=True):
        torch.testing.assert_close(found, scores, atol=1e-6, rtol=0)
    assert "'user': a raw ID is not in 0..999" in printed.stdout + printed.stderr
