"""A run's folder damaged in hundreds of ways: who reads it reads what was written, or says in a line what is wrong."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support import damages, nights
from torchrec_cce.cli.main import app
from torchrec_cce.errors import DataFileError, MapFileError
from torchrec_cce.methods.cce import CCEEmbeddingBagConfig
from torchrec_cce.modules.embedding_bag import CCEEmbeddingBagCollection
from torchrec_cce.sharding import digests
from torchrec_cce.sharding.digests import DIGESTS, read_digests
from torchrec_cce.training import checkpoint
from torchrec_cce.training.saved_model import WEIGHTS, load_model, save_model


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x40
    path.write_bytes(content)


def test_no_damage_is_read_as_if_nothing_were(run: Path) -> None:
    assert damages.attack(run, tries=150, seed=1, readers=damages.READERS) == []


def test_no_damage_to_what_older_versions_wrote_is_a_traceback(run: Path, tmp_path: Path) -> None:
    old = damages.without_digests(run, tmp_path / "old")
    assert damages.attack(old, tries=100, seed=2, readers=damages.READERS, may_differ=True) == []


def test_the_attack_would_see_it(run: Path, tmp_path: Path) -> None:
    """Without digests, a bit of the weights is read as if nothing were."""
    old = damages.without_digests(run, tmp_path / "old")
    assert any("else was read" in line for line in damages.attack(old, tries=60, seed=2, readers=damages.READERS))


def test_every_file_is_recorded(run: Path) -> None:
    folder = nights.newest(run)
    recorded = read_digests(folder)
    assert recorded is not None
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {DIGESTS}
    assert recorded.files.keys() == there
    assert recorded.run.keys() == {"config.json"}
    assert checkpoint.damage_in(run) == []


def test_verify_names_each_damaged_file(run: Path) -> None:
    folder = nights.newest(run)

    def verify(path: Path, *options: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["verify", str(path), *options])
        return done.exit_code, done.stdout

    assert verify(run) == (0, "no damage\n")
    assert verify(folder, "--json") == (0, "[]\n")
    pointers = next(folder.rglob("0000.pointers.arrow"))
    flip(pointers, 700)
    (folder / ".metadata").unlink()
    code, said = verify(run)
    lines = said.splitlines()
    assert code == 1
    assert [line.split(": ")[0] for line in lines] == [str(folder / ".metadata"), str(pointers)]
    flip(folder / DIGESTS, 40)
    code, said = verify(run, "--json")
    assert code == 1
    assert DIGESTS in json.loads(said)[0]
    assert verify(run.parent / "none")[0] == 2


def test_one_bit_of_the_weights_is_found_by_every_reader(run: Path) -> None:
    (file,) = nights.newest(run).glob("*.distcp")
    flip(file, file.stat().st_size // 2)
    for reader in damages.READERS.values():
        with pytest.raises(DataFileError, match=r"__0_0.distcp: damaged, .* copy the checkpoint again"):
            reader(run)


def test_another_configuration_beside_the_checkpoint_is_found(run: Path) -> None:
    """One digit of a seed or a number of rows would be read as if nothing were."""
    path = run / "config.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(DataFileError, match=r"config.json: damaged, or of another checkpoint"):
        damages.publish(run)


def test_what_older_versions_wrote_opens_with_a_warning(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = damages.without_digests(run, tmp_path / "old")
    with caplog.at_level(logging.WARNING, logger=digests.__name__):
        assert damages.publish(old) == damages.publish(run)
    (warned,) = (record.getMessage() for record in caplog.records if record.name == digests.__name__)
    assert "written before checkpoints had digests" in warned
    (said,) = checkpoint.damage_in(old)
    assert "has no digests.json" in said


@pytest.mark.parametrize("killed_after", [DIGESTS, checkpoint.POSITION])
def test_killed_while_a_position_is_replaced(run: Path, monkeypatch: pytest.MonkeyPatch, killed_after: str) -> None:
    """The checkpoint is whole with the old position, and with the new one."""
    folder = nights.newest(run)
    before = checkpoint.read_position(folder)
    real = digests.atomic_path

    class Killed(BaseException):
        pass

    def dying(path: Path):  # type: ignore[no-untyped-def]
        if path.name != DIGESTS and killed_after == DIGESTS:
            raise Killed
        return real(path)

    monkeypatch.setattr(digests, "atomic_path", dying)
    changed = checkpoint.read_position(folder)
    changed.validated = 99
    if killed_after == DIGESTS:
        with pytest.raises(Killed):
            checkpoint.write_position(folder, changed)
    else:
        checkpoint.write_position(folder, changed)
    assert checkpoint.damage_in(run) == []
    assert checkpoint.read_position(folder) == (before if killed_after == DIGESTS else changed)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"1" * 9999, b'{"step": "many"}', b"[" * 99999, b"\xff\xfe"])
def test_documents_that_are_none(run: Path, tmp_path: Path, content: bytes) -> None:
    old = damages.without_digests(run, tmp_path / "old")
    for path in (nights.newest(old) / checkpoint.POSITION, nights.newest(old) / ".metadata", old / "config.json"):
        before = path.read_bytes()
        path.write_bytes(content)
        done = CliRunner().invoke(app, ["evaluate", str(old)])
        assert done.exit_code == 2, path
        assert str(path) in done.stderr.splitlines()[-1]
        path.write_bytes(before)


def test_the_same_input_is_the_same_weights(trained: Path, tmp_path: Path) -> None:
    """Another checkpoint under the same name, of the same maps and the same layout, is another input."""
    night = nights.Night(tmp_path, trained, thresholds=nights.EASY)
    night.recluster()
    assert night.recluster().summary.status == "there already"
    folder = nights.newest(night.run)
    (file,) = folder.glob("*.distcp")
    flip(file, file.stat().st_size // 2)
    digests.write_digests(folder, digests.digests_of(folder, {}), {})
    with pytest.raises(ValueError, match="is there already, of other content"):
        night.recluster()


def test_what_the_job_writes_has_digests(trained: Path, tmp_path: Path) -> None:
    night = nights.Night(tmp_path, trained, thresholds=nights.EASY)
    night.recluster()
    assert checkpoint.damage_in(night.output) == []
    recorded = read_digests(nights.newest(night.output))
    assert recorded is not None
    assert any(name.startswith("__recluster_") for name in recorded.files)


def test_a_model_in_a_folder(tmp_path: Path) -> None:
    table = CCEEmbeddingBagConfig(
        name="t", num_embeddings=100, embedding_dim=8, feature_names=["f"], num_rows=4, num_columns=2
    )
    model = CCEEmbeddingBagCollection(tables=[table])
    save_model(model, tmp_path / "model")
    load_model(model, tmp_path / "model")
    for at in range(100, (tmp_path / "model" / WEIGHTS).stat().st_size, 300):
        flip(tmp_path / "model" / WEIGHTS, at)
        with pytest.raises(MapFileError, match=r"weights\.pt: damaged"):
            load_model(model, tmp_path / "model")
        flip(tmp_path / "model" / WEIGHTS, at)


def part_of(rank: int) -> damages.Reader:
    """What one of two ranks compares; it reads nothing more."""

    def reader(folder: Path) -> str:
        digests.check_digests(folder, None, rank=rank, world_size=2)
        return ""

    return reader


def test_two_ranks_share_what_is_to_compare(trained: Path, tmp_path: Path) -> None:
    """Each finds what is in its part alone; together they find all."""
    folder = nights.newest(shutil.copytree(trained, tmp_path / "run"))
    recorded = read_digests(folder)
    assert recorded is not None
    for name in (name for name in recorded.files if not name.startswith("maps/")):
        flip(folder / name, 1)
        found = [damages.outcome(part_of(rank), folder)[0] for rank in range(2)]
        flip(folder / name, 1)
        assert sorted(found, key=str) == ["", None], name
