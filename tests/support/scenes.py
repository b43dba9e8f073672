"""What is done to files, to be disturbed at every call: publish, gc, checkpoint, recluster and remap, all small."""

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from unittest import mock

from tests.support.failing_calls import Scene
from tests.support.nights import EASY, Night
from tests.support.registries import Recipe, broken_links, content, strays
from tests.support.remap_folders import NAMES, Place, contents
from torchrec_cce.jobs.recluster import job as recluster_job
from torchrec_cce.jobs.recluster.request import ReclusterJob
from torchrec_cce.jobs.remap import file as remap_file
from torchrec_cce.jobs.remap import job as remap_job
from torchrec_cce.jobs.remap.output import verify
from torchrec_cce.maps.registry import Registry
from torchrec_cce.training import checkpoint
from torchrec_cce.training.checkpoint import CheckpointWriter
from torchrec_cce.training.config_file import read_run_config
from torchrec_cce.training.parallel import process_group
from torchrec_cce.training.run import Run, owned
from torchrec_cce.workers.inline import InlineEngine

_OLD, _NEW = (Recipe(seed=seed, num_ids=60) for seed in (1, 2))


def publishing(folder: Path, *, first: bool = False) -> Scene:
    """A second version, or the first one of a registry that is not there."""
    (folder / "there").mkdir(parents=True)
    if not first:
        _publish(folder, _OLD)

    def wrong(where: Path, done: bool) -> list[str]:
        registry = Registry(where / "registry", cache=where / f"cache-{len(list(where.iterdir()))}")
        if first and not done and (not (where / "registry").exists() or not registry.state().versions):
            return []
        return _wrong_with(registry, [_NEW] if done or first else [_OLD, _NEW])

    return Scene(prepared=folder, act=lambda where: _publish(where, _NEW), wrong=wrong)


def collecting(folder: Path) -> Scene:
    """Three versions and debris, of which one version stays."""
    for recipe in (_NEW, _NEW.derived(1), _OLD):
        _publish(folder, recipe)
    (folder / "registry" / "versions" / "00000009-00000000").mkdir()
    (folder / "registry" / "versions" / "00000009-00000000" / "0000.pointers").write_bytes(b"debris")

    def wrong(where: Path, done: bool) -> list[str]:
        registry = Registry(where / "registry", cache=where / "cache")
        found = _wrong_with(registry, [_OLD])
        if done:
            found += [] if [each.version for each in registry.state().versions] == [3] else ["other versions"]
        return found

    def act(where: Path) -> None:
        Registry(where / "registry", cache=where / "cache").gc(keep_last=1, debris_age=timedelta(0))

    def left(where: Path) -> list[str]:
        return sorted(strays(Registry(where / "registry", cache=where / "cache"), where / "registry"))

    return Scene(prepared=folder, act=act, wrong=wrong, left=left)


def remapping(folder: Path) -> Scene:
    """Three files."""
    place = Place(folder / "prepared")
    _remap(place.folder, folder / "whole")
    whole = contents(folder / "whole")

    def wrong(where: Path, done: bool) -> list[str]:
        found = contents(where / "out") if (where / "out").exists() else {}
        there = [name for name in NAMES if name in found]
        faults = [f"{name} is there and other" for name in there if found[name] != whole[name]]
        if done:
            verify(str(where / "out"))
            faults += [f"{name} is missing" for name in whole.keys() - found.keys()]
        return faults

    return Scene(
        prepared=place.folder,
        act=lambda where: _remap(where, where / "out"),
        wrong=wrong,
        left=lambda where: sorted(contents(where / "out").keys() - whole.keys()),
    )


def reclustering(folder: Path, trained: Path) -> Scene:
    """The nightly job on a small run."""
    night = Night(folder / "prepared", trained, thresholds=EASY)
    shutil.rmtree(folder / "prepared" / "cache", ignore_errors=True)

    def act(where: Path) -> None:
        job = ReclusterJob(
            registry=str(where / "registry"),
            checkpoint=where / "run",
            output=where / "output",
            num_workers=1,
            thresholds=EASY,
        )
        with mock.patch.object(recluster_job, "engine_of", return_value=InlineEngine(1)):
            recluster_job.recluster(job)

    def wrong(where: Path, done: bool) -> list[str]:
        registry = Registry(where / "registry", cache=where / "checked")
        faults = [str(each) for each in (*registry.verify(), *broken_links(registry.history()))]
        versions = [each.version for each in registry.state().versions]
        if versions not in ([1], [1, 2]):
            faults.append(f"versions {versions}")
        if (where / "output").exists():
            faults += checkpoint.damage_in(where / "output")
            faults += [] if versions == [1, 2] else ["an output of a version that is not published"]
        elif done:
            faults.append("no output")
        return faults

    return Scene(
        prepared=night.folder, act=act, wrong=wrong, left=lambda where: [path.name for path in where.glob(".*")]
    )


@contextmanager
def saving(folder: Path, trained: Path) -> Iterator[Scene]:
    """The next checkpoint of a small run."""
    shutil.copytree(trained, folder / "run")
    with process_group() as ranks:
        run = Run(read_run_config(trained), trained, ranks)
        run.resume()
        position = copy.deepcopy(run.position)
        position.step += 1

        def act(where: Path) -> None:
            with owned(where / "run", "either") as check:
                CheckpointWriter(where / "run", check=check).save(run.model, run.optimizer, position, run.frequencies)

        def wrong(where: Path, done: bool) -> list[str]:
            newest = checkpoint.newest(where / "run")
            faults = checkpoint.damage_in(where / "run")
            step = checkpoint.read_position(newest).step
            allowed = [position.step] if done else [position.step - 1, position.step]
            faults += [] if step in allowed else [f"step {step}, not one of {allowed}"]
            return faults

        def left(where: Path) -> list[str]:
            return [path.name for pattern in (".*", "checkpoints/.*") for path in (where / "run").glob(pattern)]

        yield Scene(prepared=folder, act=act, wrong=wrong, left=left)


def _publish(folder: Path, recipe: Recipe) -> None:
    Registry(folder / "registry", cache=folder / "cache").publish(recipe.tables(), checkpoint=recipe.note)


def _wrong_with(registry: Registry, allowed: list[Recipe]) -> list[str]:
    opened = registry.open(verify="all")
    recipe = Recipe.noted_in(opened.manifest)
    faults = [str(each) for each in (*registry.verify(), *broken_links(registry.history()))]
    faults += [] if recipe in allowed else [f"{opened.identity} is current"]
    return faults + ([] if content(opened.tables) == content(recipe.tables()) else ["other content"])


def _remap(folder: Path, output: Path) -> None:
    remap_file._OPENED.clear()  # by the path of a registry, which is another one in every try
    with mock.patch.object(remap_job, "engine_of", return_value=InlineEngine(1)):
        remap_job.remap(str(folder / "raw"), str(output), registry=str(folder / "registry"))
