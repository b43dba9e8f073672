"""The kernels for GPUs, where there is none: what they compute, in Triton's interpreter, and that they compile."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: pip install torchrec-cce[dev] on Linux, x86-64"
)
ROOT = Path(__file__).parent.parent.parent


def test_in_the_interpreter() -> None:
    """In a process of its own: Triton asks once, when it is imported, whether it is to interpret."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/interpreted"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To machine code of a GPU, which takes none: the interpreter knows neither types nor shapes of registers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from torchrec_cce.kernels.lookup_on_gpu import bags

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kinds = dict.fromkeys(("columns", "tiles", "tables", "words", "offsets"), "*i64")
    kinds |= dict.fromkeys(("weights", "out", "gradients"), "*fp32")
    for kernel, sizes, is_weighted in (
        (bags.pool_bags, {"WIDTH": 5, "TERMS": 2, "LANES": 64, "BAGS": 32}, False),
        (bags.add_gradients, {"WIDTH": 5, "TERMS": 2, "LANES": 16, "BAGS": 32}, True),
    ):
        constants = sizes if is_weighted else sizes | {"weights": None}
        signature = {n: "constexpr" if n in constants else kinds.get(n, "i32") for n in kernel.arg_names}
        source = ASTSource(kernel, signature=signature, constexprs=constants)
        assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
