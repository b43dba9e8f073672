"""A command that needs no torch does not wait for it."""

import json
import subprocess
import sys
from pathlib import Path

from tests.support.snapshots import snapshot
from torchrec_cce.maps.registry import Registry

_RUN_ALL = """
import json, sys
from torchrec_cce.cli.main import app
for arguments in json.loads(sys.argv[1]):
    try:
        app(arguments)
    except SystemExit as exit:
        assert not exit.code, arguments
assert not {"torch", "torchrec"} & set(sys.modules), arguments
"""


def run_all(commands: list[list[str]]) -> str:
    """What `commands` print, one after another in a process that must not import torch."""
    done = subprocess.run(
        [sys.executable, "-c", _RUN_ALL, json.dumps(commands)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"COLUMNS": "120", "TERM": "dumb"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_is_there_at_once() -> None:
    """That of a command too, with its options."""
    commands = ["train", "evaluate", "plan", "bench", "demo", "remap", "recluster", "maps"]
    said = run_all([["--help"], *([name, "--help"] for name in commands)])
    for name in commands:
        assert f"{name} [OPTIONS]" in said
    for option in ("--run-dir", "--restartable", "--data", "--world-size", "--max-parameters"):
        assert option in said


def test_the_registry_is_asked_without_torch(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry", cache=tmp_path / "cache")
    for seed in range(2):
        registry.publish({"t_user": snapshot(seed)})
    commands = ["list", "show", "history", "verify", "diff 1 2", "pin 1", "unpin 1", "rollback 1", "gc --keep-last 2"]
    said = run_all([["maps", *one.split(), "--registry", str(tmp_path / "registry")] for one in commands])
    assert "2 ← current" in said
    assert "version 2, parent 1, created " in said
    assert registry.state().current == 1


def test_names_of_the_package_are_imported_when_they_are_used() -> None:
    program = """
import sys, torchrec_cce
import torchrec_cce.data, torchrec_cce.experiments, torchrec_cce.jobs.recluster, torchrec_cce.jobs.remap
import torchrec_cce.maps, torchrec_cce.methods, torchrec_cce.modules, torchrec_cce.sharding, torchrec_cce.training
assert sorted(set(sys.modules) & {"torch", "torchrec", "numpy"}) == []
from torchrec_cce.maps import *
from torchrec_cce import Registry, build_vocabulary
assert sorted(set(sys.modules) & {"torch", "torchrec"}) == []
from torchrec_cce import *
from torchrec_cce.modules.embedding_bag import CCEEmbeddingBagCollection as defined
assert CCEEmbeddingBagCollection is defined is torchrec_cce.CCEEmbeddingBagCollection
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
