"""Registries that were damaged or made to do harm, and whether a reader comes to any: `attack` is one of many tries."""

import hashlib
import json
import os
import random
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from typer.testing import CliRunner

from tests.support.registries import Recipe, content, flip
from torchrec_cce.cli.main import app
from torchrec_cce.errors import CCEError
from torchrec_cce.maps.arrow_file import list_array
from torchrec_cce.maps.manifest import MANIFEST
from torchrec_cce.maps.registry import MapVersion, Registry
from torchrec_cce.maps.sealed import seal
from torchrec_cce.maps.snapshot import TableSnapshot

_RECIPE = Recipe(seed=3, num_ids=50)
_SECONDS = 20
_MEMORY_KB = 300_000
"""That reading small registries may add to this process, in all."""


class Hostile:
    """A sound registry of two versions, to be damaged; beside it lies `canary`, which nobody may touch."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "registry"
        self.registry = Registry(self.root, cache=folder / "cache")
        for _ in range(2):
            self.registry.publish(_RECIPE.tables(), checkpoint=_RECIPE.note)
        self.canary = folder / "canary"
        self.canary.mkdir()
        (self.canary / "file.arrow").write_bytes(b"not of the registry")
        self.record = self.root / f"log/{2:020d}.json"
        self.version = self.root / self.registry.state().versions[-1].folder

    def files(self) -> list[Path]:
        """Of the current version, and the newest record."""
        return [self.record, *sorted(self.version.iterdir())]

    def edit_record(self, edit: Callable[[dict[str, Any]], object]) -> None:
        """Change the newest record, and make its seal good."""
        record = json.loads(self.record.read_bytes())["content"]
        edit(record)
        self.record.write_bytes(seal(record))

    def edit_manifest(self, edit: Callable[[dict[str, Any]], object]) -> None:
        """Change the current manifest, and make all digests of it good."""
        path = self.version / MANIFEST
        manifest = json.loads(path.read_bytes())["content"]
        edit(manifest)
        path.write_bytes(seal(manifest))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        self.edit_record(lambda record: record["versions"][-1].update(manifest_sha256=digest))

    def publish(self, **tables: TableSnapshot) -> None:
        with mock.patch.object(Registry, "_churn_since", return_value={}):  # which would look at them
            self.registry.publish({**_RECIPE.tables(), **tables}, checkpoint=_RECIPE.note)


def flipped_bit(hostile: Hostile, rng: random.Random) -> None:
    path = rng.choice(hostile.files())
    path.write_bytes(flip(path.read_bytes(), rng))


def cut_short(hostile: Hostile, rng: random.Random) -> None:
    path = rng.choice(hostile.files())
    os.truncate(path, rng.randrange(path.stat().st_size))


def stray_files(hostile: Hostile, rng: random.Random) -> None:
    names = [
        "._00000000000000000009.json",
        "zz.json",
        f"{3:020d} (copy).json",
        "a/b.json",
        f"{9:020d}.json.bak",
        "\x1b[2J",
    ]
    for name in rng.sample(names, 3):
        path = hostile.root / "log" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(rng.randbytes(20))
    (hostile.root / "versions" / "stray").write_bytes(b"")


def pointers_beyond(hostile: Hostile, rng: random.Random) -> None:
    table = _RECIPE.tables()["small"]
    pointers = table.pointer_map.stored_view.copy()
    pointers[rng.randrange(len(pointers)), rng.randrange(2)] = rng.randrange(50, 256)
    hostile.publish(small=replace(table, pointer_map=replace(table.pointer_map, stored=list_array(pointers))))


def positions_beyond(hostile: Hostile, rng: random.Random) -> None:
    table = _RECIPE.tables()["small"]
    vocabulary = table.pointer_map.vocabulary
    assert vocabulary is not None
    slots = vocabulary.slots_view.copy()
    slots[rng.randrange(len(slots) - 1), 1] = rng.choice([-2, vocabulary.num_ids, 2**40, -(2**60)])
    made = replace(vocabulary, slots=list_array(slots))
    hostile.publish(small=replace(table, pointer_map=replace(table.pointer_map, vocabulary=made)))


def another_digest(hostile: Hostile, rng: random.Random) -> None:
    field = rng.choice(["map_digest", "vocabulary"])

    def edit(manifest: dict[str, Any]) -> None:
        entry = manifest["tables"]["small"]
        (entry if field == "map_digest" else entry["vocabulary"])[
            "map_digest" if field == "map_digest" else "digest"
        ] = rng.randbytes(32).hex()

    hostile.edit_manifest(edit)


def names_with_escapes(hostile: Hostile, rng: random.Random) -> None:
    name = rng.choice(
        ["\x1b[2J\x1b]0;title\x07", "[bold red]x[/bold red]", "a\nb\rc", "\u202egnp.exe", "[/x]", "\x9b1m"]
    )
    table = _RECIPE.tables()["small"]
    hostile.registry.publish({name: replace(table, feature_names=(name,))}, checkpoint=name)


def links_and_pipes(hostile: Hostile, rng: random.Random) -> None:
    path = rng.choice(hostile.files())
    match rng.randrange(5):
        case 0:
            path.unlink()
            os.mkfifo(path)
        case 1:
            path.unlink()
            path.symlink_to("/dev/zero")
        case 2:
            path.unlink()
            path.symlink_to(hostile.canary / "file.arrow")
        case 3:
            (hostile.root / "log" / "again").symlink_to(hostile.root)
            (hostile.root / "versions" / "out").symlink_to(hostile.canary)
        case _:
            path.unlink()
            path.symlink_to(path)


def names_that_lead_out(hostile: Hostile, rng: random.Random) -> None:
    name = rng.choice(
        ["../../canary/file.arrow", str(hostile.canary / "file.arrow"), "..", "a/../b.arrow", ".arrow", "x\0.arrow"]
    )
    if rng.random() < 0.5:
        hostile.edit_manifest(lambda manifest: manifest["tables"]["large"]["pointers"].update(name=name))
    else:
        folder = rng.choice(["../canary", "versions/../../canary", str(hostile.canary), "", "versions"])
        place = rng.randrange(2)
        hostile.edit_record(lambda record: record["versions"][place].update(folder=folder))


def numbers_without_measure(hostile: Hostile, rng: random.Random) -> None:
    huge = rng.choice([2**62, 2**63 - 1, 2**64, -1, 10**30, 1e300])
    match rng.randrange(5):
        case 0:
            field = rng.choice(["num_values", "num_bytes"])
            hostile.edit_manifest(lambda manifest: manifest["tables"]["large"]["pointers"].update({field: huge}))
        case 1:
            field = rng.choice(["num_ids", "num_rows", "num_columns", "embedding_dim", "num_embeddings", "generation"])
            hostile.edit_manifest(lambda manifest: manifest["tables"]["large"].update({field: huge}))
        case 2:
            field = rng.choice(["current", "next_version", "sequence"])
            hostile.edit_record(lambda record: record.update({field: huge}))
        case 3:
            os.truncate(rng.choice(sorted(hostile.version.glob("*.arrow"))), 1 << 42)
        case _:
            hostile.edit_manifest(lambda manifest: manifest["tables"]["small"]["vocabulary"].update(num_buckets=huge))


ATTACKS = (
    *(flipped_bit, cut_short, stray_files, pointers_beyond, positions_beyond, another_digest, names_with_escapes),
    *(links_and_pipes, names_that_lead_out, numbers_without_measure),
)
"""Each damages a registry."""
_HARMLESS = {stray_files, names_with_escapes}
"""What is read as if nothing were."""
_FOUND = {flipped_bit, cut_short, pointers_beyond, positions_beyond, another_digest}
"""Of which `verify` must say something."""


def attack(folder: Path, number: int) -> list[str]:
    """What went wrong in one try; nothing if all is as it should be. `folder` is new."""
    rng, damage = random.Random(number), ATTACKS[number % len(ATTACKS)]
    hostile = Hostile(folder)
    damage(hostile, rng)
    registry = Registry(hostile.root, cache=folder / "other cache")
    said: list[str] = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with _in_time(said):
        for read in (
            registry.state,
            registry.history,
            registry.manifest,
            registry.open,
            lambda: registry.open(verify="all"),
        ):
            said += _tried(read, harmless=damage in _HARMLESS)
        with suppress(CCEError):
            if not registry.verify() and damage in _FOUND:
                said.append("verify finds nothing")
        said += _printed(hostile.root, folder)
        with suppress(CCEError):
            registry.gc(keep_last=1, debris_age=timedelta(0))
    if (hostile.canary / "file.arrow").read_bytes() != b"not of the registry":
        said.append("a file outside was changed")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if grown > _MEMORY_KB:
        said.append(f"{grown} KiB of memory")
    return [f"{damage.__name__} {number}: {what}" for what in said]


def _tried(read: Callable[[], object], *, harmless: bool) -> list[str]:
    try:
        found = read()
    except CCEError as error:
        return [f"is refused: {error}"] if harmless else []
    except Exception as error:  # noqa: BLE001  which is what is looked for
        return [f"{type(error).__name__}: {error}"]
    return _wrong(found.tables) if isinstance(found, MapVersion) else []


def _wrong(tables: Any) -> list[str]:
    """Codes and positions that lead out of tables, and tables that are none that a publisher meant."""
    said = []
    for name, table in tables.items():
        pointer_map = table.pointer_map
        if pointer_map.stored is not None and np.max(pointer_map.stored_view) >= pointer_map.num_rows:
            said.append(f"table {name!r} has a pointer beyond its codewords")
        if pointer_map.vocabulary is not None and pointer_map.vocabulary.slots_view[:, 1].max() >= pointer_map.num_ids:
            said.append(f"table {name!r} has a position beyond its IDs")
    if set(tables) == {"large", "small"} and content(tables) != content(_RECIPE.tables()):
        said.append("other tables than were published")
    return said


def _printed(root: Path, folder: Path) -> list[str]:
    """What is wrong with what commands print of the registry."""
    said = []
    for command in (["list"], ["show"], ["history"], ["verify"]):
        done = CliRunner(env={"TORCHREC_CCE_CACHE": str(folder / "cache")}).invoke(
            app, ["maps", *command, "--registry", str(root)]
        )
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            said.append(f"maps {command[0]}: {done.exception!r}")
        steering = {letter for letter in done.output if not letter.isprintable()} - {"\n"}
        if steering:
            said.append(f"maps {command[0]} prints {steering}")
    return said


@contextmanager
def _in_time(said: list[str]) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError("no end")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_SECONDS)
    try:
        yield
    except TimeoutError:
        said.append(f"no end within {_SECONDS} s")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
