"""Folders of strangers: whatever they hold, no command and no call runs it; it says in one line what is wrong."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save
from typer.testing import CliRunner

from tests.support import hostile, nights, runs
from torchrec_cce.cli.main import app
from torchrec_cce.errors import CCEError, MapFileError
from torchrec_cce.methods.cce import CCEEmbeddingBagConfig
from torchrec_cce.modules.embedding_bag import CCEEmbeddingBagCollection
from torchrec_cce.sharding.distributed_checkpoint import DistributedCheckpoint
from torchrec_cce.training import saved_model
from torchrec_cce.training.config_file import read_run_config
from torchrec_cce.training.saved_model import load_model, save_model
from torchrec_cce.training.versions import snapshot_of_run

FAILED = 1
"""The status of `recluster` for an error of a checkpoint; that of the other commands is 2."""


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def commands(run: Path) -> dict[str, list[str]]:
    folder = run.parent
    config = read_run_config(run)
    same = runs.write_toml(folder / "run.toml", config)
    derived = folder / "derived.toml"
    derived.write_text(same.read_text() + f'derive = {{run = "{run}"}}\n')
    recluster = ["recluster", "--registry", f"{folder}/registry", "--checkpoint", str(run)]
    recluster += ["--output-checkpoint", f"{folder}/output"]
    return {
        "evaluate": ["evaluate", str(run)],
        "publish": ["maps", "publish", "--registry", f"{folder}/registry", "--run-dir", str(run)],
        "recluster": recluster,
        "dry run": [*recluster, "--dry-run"],
        "resume": ["train", str(same), "--run-dir", str(run), "--resume", "--quiet"],
        "derive": ["train", str(derived), "--run-dir", f"{folder}/derived", "--quiet"],
        "verify": ["verify", str(run)],
    }


@pytest.mark.parametrize("attack", hostile.ATTACKS, ids=lambda attack: attack.__name__)
def test_no_command_runs_what_a_checkpoint_holds(run: Path, attack: Callable[[Path, Path], None]) -> None:
    folder, marker = nights.newest(run), run.parent / "marker"
    snapshot = snapshot_of_run(run)
    nights.Registry(run.parent / "registry").publish(snapshot.tables, checkpoint=snapshot.checkpoint)
    attack(folder, marker)
    hostile.forge_digests(folder)
    for name, arguments in commands(run).items():
        done = CliRunner().invoke(app, arguments)
        assert not marker.exists(), name
        if name == "verify":
            continue  # it compares bytes alone
        assert done.exit_code == (FAILED if name in ("recluster", "dry run") else 2), (name, done.output)
        (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
        assert str(folder) in line, name
    assert not (run.parent / "output").exists()


@pytest.mark.parametrize(
    "named",
    [
        "cbuiltins\ngetattr\n.",
        "cbuiltins\neval\n.",
        "cos\nsystem\n.",
        "cnumpy.core.multiarray\n_reconstruct\n.",
        "cnumpy._core.multiarray\nscalar\n.",
        "ctorch.storage\n_load_from_bytes\n.",
        "ctorch\nload\n.",
        "ctorch\nSize.__init__\n.",
        "ctorch.distributed.checkpoint.metadata\nos\n.",
        "ctorch.distributed.checkpoint.metadata\nos.system\n.",
        "ctorch.distributed.checkpoint.filesystem\npickle\n.",
        "ccollections\nnamedtuple\n.",
        "ccopyreg\n_reconstructor\n.",
        "coperator\nattrgetter\n.",
        "cpathlib\nPath\n.",
    ],
)
def test_an_index_names_nothing_but_what_it_is_made_of(tmp_path: Path, named: str) -> None:
    for content in (named.encode(), b"\x80\x04" + named.encode()):
        (tmp_path / ".metadata").write_bytes(content)
        with pytest.raises(CCEError, match=r"\.metadata: damaged, .* which no index is made of"):
            _ = DistributedCheckpoint(folder=tmp_path).metadata


def test_an_index_changes_no_class(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.metadata import Metadata

    content = pickle.dumps(Metadata)[:-1] + pickle.dumps((None, {"version": "changed"}))[2:-1] + b"b."
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CCEError, match="changes an object that is no record"):
        _ = DistributedCheckpoint(folder=tmp_path).metadata
    assert Metadata.version is None


def test_an_index_stays_in_its_folder(run: Path) -> None:
    folder = nights.newest(run)
    index = pickle.loads((folder / ".metadata").read_bytes())
    for stored in index.storage_data.values():
        stored.relative_path = f"../{folder.name}/{stored.relative_path}"
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    hostile.forge_digests(folder)
    with pytest.raises(CCEError, match="outside of its folder"):
        snapshot_of_run(run)


def test_values_that_are_no_tensors(tmp_path: Path) -> None:
    folder, marker = tmp_path / "checkpoint", tmp_path / "marker"
    save({"numbers": [1, "two"], "value": hostile.Payload(marker)}, checkpoint_id=folder, no_dist=True)
    wanted = {"numbers": [0, ""]}
    DistributedCheckpoint(folder=folder).fill(wanted)
    assert wanted == {"numbers": [1, "two"]}
    with pytest.raises(CCEError, match="a file is missing or damaged"):
        DistributedCheckpoint(folder=folder).fill({"value": None})
    assert not marker.exists()


def test_a_model_in_a_folder(tmp_path: Path) -> None:
    table = CCEEmbeddingBagConfig(
        name="t", num_embeddings=100, embedding_dim=8, feature_names=["f"], num_rows=4, num_columns=2
    )
    model = CCEEmbeddingBagCollection(tables=[table])
    folder, marker = tmp_path / "model", tmp_path / "marker"
    save_model(model, folder)
    torch.save(hostile.Payload(marker), folder / saved_model.WEIGHTS)
    hostile.forge_digests(folder)
    with pytest.raises(MapFileError, match="missing or damaged"):
        load_model(model, folder)
    assert not marker.exists()
