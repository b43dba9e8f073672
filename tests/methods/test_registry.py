"""A method is declared once: in its file, and by its name in the registry."""

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import get_args

from torchrec_cce.methods import registry
from torchrec_cce.methods.registry import FAMILIES, METHODS, SPECS, Method

ROOT = Path(__file__).parent.parent.parent

_TOY = '''
"""A vector for all IDs."""

from dataclasses import dataclass

import torch

from torchrec_cce.methods.computed import ComputedEmbeddingBagConfig, ComputedTable, parameter
from torchrec_cce.methods.table import MethodSpec


@dataclass(kw_only=True)
class ToyEmbeddingBagConfig(ComputedEmbeddingBagConfig):
    @property
    def num_parameters(self):
        return self.embedding_dim

    def build(self, device=None):
        return Toy(self, device)


class Toy(ComputedTable):
    def __init__(self, config, device):
        super().__init__(config)
        self.vector = parameter(config.embedding_dim, device=device)
        self.reset_parameters()

    def reset_parameters(self):
        torch.nn.init.ones_(self.vector)

    def embed(self, ids):
        return self.vector.expand(len(ids), -1)


METHODS = (MethodSpec(name="toy", family="toys", size=lambda sizing: sizing.make(ToyEmbeddingBagConfig)),)
'''
_USE = """
import torch
from torchrec import EmbeddingBagConfig
from torchrec_cce import METHODS, CompressedEmbeddingBag, tables_under_cap
from torchrec_cce.experiments.quality_charts import family_of
from torchrec_cce.training.config import EmbeddingConfig
from torchrec_cce.training.model import sizes_of

full = EmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=4, feature_names=["f"])
(table,) = tables_under_cap([full], method="toy", max_parameters=8)
bag = CompressedEmbeddingBag(table)
assert bag(torch.tensor([[3, 8]])).tolist() == [[2.0] * 4]
assert sizes_of([bag.collection]).parameters == 4
assert EmbeddingConfig(method="toy", max_parameters=8).method == "toy"
assert (METHODS[1], family_of("toy")) == ("toy", "toys")
"""


def test_declarations_and_documents_agree() -> None:
    assert set(SPECS) == set(METHODS) - {"full"} == set(get_args(Method)) - {"full"}
    assert Counter(spec.name for file in registry._FILES for spec in file.METHODS) == Counter(SPECS.keys())
    assert Counter(name for members in FAMILIES.values() for name in members) == Counter(SPECS.keys())
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/methods.md").read_text(), flags=re.MULTILINE)
    documented = Counter(name for row in rows for name in re.findall(r"`(\w+)`", row))
    assert documented == Counter(METHODS)


def test_the_report_keeps_the_order_of_its_families() -> None:
    assert list(FAMILIES) == [
        "hashing",
        "quotients and computed tables",
        "pointers learned after training",
        "CCE",
        "CCE with residents",
    ]


def test_a_new_method_touches_its_file_and_the_registry(tmp_path: Path) -> None:
    """In a copy of the package: what trains, counts, configures and reports learns of it from there."""
    package = tmp_path / "torchrec_cce"
    shutil.copytree(ROOT / "torchrec_cce", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "methods/toy.py").write_text(_TOY)
    registry = package / "methods/registry.py"
    text = registry.read_text()
    for old, new in (
        ('    "full",\n', '    "full",\n    "toy",\n'),
        ("rowless, sketch\n", "rowless, sketch, toy\n"),
        ("sketch, cce)", "sketch, cce, toy)"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    registry.write_text(text)
    program = [sys.executable, "-W", "ignore", "-c", _USE]
    done = subprocess.run(
        program, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
