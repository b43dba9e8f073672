"""The registry under kills, crowds and damage, and what publishing and opening a large map costs."""

import multiprocessing
import os
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.figure import report
from benchmarks.processes import Peak, fresh, mapping_bytes
from tests.support.contention import begin, crowd, lost_updates
from tests.support.forks import Fork, apart
from tests.support.kills import Outcome, kill_publishers
from tests.support.registries import Recipe, Target, damage, flipped, strays
from tests.support.s3_server import FLAKY, TIMEOUT_S, s3_server
from torchrec_cce.errors import MapFileError
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.maps.registry import Registry
from torchrec_cce.maps.snapshot import TableSnapshot

KILLS = 200
CROWD, CROWD_SECONDS = 8, 60
NUM_IDS, NUM_COLUMNS = 100_000_000, 4
SHARED_IDS = 2**27
FLIPS = 50
ROUNDS = 3

MIB = 2**20
POINTERS = "0000.pointers.arrow"


def registry_figures() -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        kills_on_a_disk(folder / "kills")
        kills_on_a_store(folder / "kills-store")
        contention(folder / "crowd")
        flips(folder / "flips")
        large_map(folder / "large")
        sharing(folder / "sharing")


def kills_on_a_disk(folder: Path) -> None:
    target = Target(url=str(folder / "registry"), cache=folder / "cache")
    outcome = apart(folder / "job", kill_publishers, target=target, kills=KILLS, seed=0, timeout=300)
    _report_kills("disk", outcome, target.open(), Path(target.url), "the disk of temporary files")


def kills_on_a_store(folder: Path) -> None:
    with s3_server() as server:
        server.fail(FLAKY)
        target = Target(url=server.url("kills"), cache=folder / "cache", options=server.options)
        outcome = apart(folder / "job", kill_publishers, target=target, kills=KILLS, seed=0, timeout=300)
        server.recover()
        failing = (
            f"moto's S3 server: of its requests {FLAKY.refused:.1%} are refused (503), {FLAKY.unanswered:.1%} carried "
            f"out but answered 500, {FLAKY.stalled_before + FLAKY.stalled_after:.1%} stalled beyond the client's "
            f"{TIMEOUT_S:g} s; {outcome.refused} errors reached a publisher or reader"
        )
        _report_kills("S3", outcome, target.open(), None, failing)


def _report_kills(where: str, outcome: Outcome, registry: Registry, root: Path | None, store: str) -> None:
    wrong = [*outcome.torn, *damage(registry)]
    report(
        f"{KILLS} SIGKILLs of publishers, {where}: reads that were torn or not verified",
        len(wrong),
        target="0",
        holds=not wrong,
        against=f"{store}; a new process opens, verifies all and compares the content after every kill",
    )
    report(
        f"{KILLS} SIGKILLs of publishers, {where}: kills inside `publish`",
        outcome.inside,
        against=f"moments drawn evenly from 0 to 1.1 times a publish, median {outcome.seconds:.2f} s; "
        f"{outcome.through} of these versions had become current",
    )
    registry.gc(keep_last=3, debris_age=timedelta(0))
    left = strays(registry, root)
    report(
        f"{KILLS} SIGKILLs of publishers, {where}: stray files after `gc`",
        len(left),
        target="0",
        holds=not left,
        against="every file and folder there is but the log and the 3 versions that were kept",
    )


def contention(folder: Path) -> None:
    target = Target(url=str(folder / "registry"), cache=folder / "cache")
    begin(target)
    tally = apart(folder / "job", crowd, target=target, publishers=CROWD, readers=CROWD, seconds=CROWD_SECONDS, seed=0)
    lost = lost_updates(target.open(), tally)
    who = f"{CROWD} publishers, {CROWD} readers for {CROWD_SECONDS} s, {os.cpu_count()} cores"
    report(
        f"{who}: lost updates",
        len(lost) + len(tally.uncertain),
        target="0",
        holds=not lost and not tally.uncertain,
        against="each record follows from the one before, each success is one record, made from its parent's content",
    )
    report(
        f"{who}: torn reads",
        len(tally.torn),
        target="0",
        holds=not tally.torn,
        against=f"{tally.opens} opens, all verified and compared; {tally.refused} more met a version just collected",
    )
    report(
        f"{who}: versions published",
        len(tally.published) - 1,
        against=f"{tally.conflicts} conflicts, {tally.other_steps} rollbacks, pins and collections between them",
    )


def flips(folder: Path) -> None:
    registry, rng = Registry(folder / "registry", cache=folder / "cache"), random.Random(0)
    recipe = Recipe(seed=0, num_ids=20_000)
    entry = registry.publish(recipe.tables(), checkpoint=recipe.note)
    version = folder / "registry" / entry.folder
    kinds = {
        "pointers": version / POINTERS,
        "weights": version / "0001.weights.arrow",
        "vocabulary": version / "0001.slots.arrow",
        "frequencies": version / "0001.frequencies.arrow",
        "manifest": version / "manifest.json",
        "newest record": folder / "registry" / "log" / f"{1:020d}.json",
    }
    for kind, path in kinds.items():
        found = {"verify": 0, "open": 0}
        for _ in range(FLIPS):
            registry.open()
            with flipped(path, rng):
                found["open"] += _finds(registry.open)
                found["verify"] += _finds(lambda: _raise_first(registry.verify()))
        for name, times in found.items():
            report(
                f"one flipped bit, {kind}: share found by `{name}`",
                times / FLIPS,
                target="1",
                holds=times == FLIPS,
                against=f"{FLIPS} random bits of {path.stat().st_size:,} bytes in a version that was opened before; "
                "modification time put back",
            )


def _finds(action: Callable[[], object]) -> bool:
    try:
        action()
    except MapFileError:
        return True
    return False


def _raise_first(damaged: list[MapFileError]) -> None:
    if damaged:
        raise damaged[0]


def large_map(folder: Path) -> None:
    map_bytes = NUM_IDS * NUM_COLUMNS * 2
    what = f"map of {NUM_IDS:,} IDs, {NUM_COLUMNS} uint16 ({map_bytes / 1e6:.0f} MB)"
    for number, which in enumerate(("first version", "second version, compared with the first")):
        cost = fresh(_publish_map, folder, NUM_IDS, number)
        report(
            f"{what}, publish, {which}: peak memory, times the map",
            cost["peak"] / map_bytes,
            target="< 1.3",
            holds=cost["peak"] < 1.3 * map_bytes,
            against=f"anonymous memory above that before the map was made, the map included; {cost['seconds']:.1f} s",
        )
    first, again = (fresh(_open_map, folder) for _ in range(2))
    for name, cost in (("first", first), ("verified before", again)):
        report(
            f"{what}, open, {name}: memory beyond the mapping, MB",
            cost["peak"] / 1e6,
            target="< 100",
            holds=cost["peak"] < 100e6,
            against="peak of anonymous memory above that before, a fresh process",
        )
    report(f"{what}, first open, s", first["seconds"], against="reads all files once; page cache warm")
    report(
        f"{what}, open when verified before, s",
        again["seconds"],
        target="< 1",
        holds=again["seconds"] < 1,
        against="a fresh process; no file is read",
    )
    for name, rate in fresh(_verify_map, folder).items():
        report(f"full verification by {name}, GB/s", rate, against=f"{what}, page cache warm, median of {ROUNDS}")


def sharing(folder: Path) -> None:
    fresh(_publish_map, folder, SHARED_IDS, 0)
    map_bytes = SHARED_IDS * NUM_COLUMNS * 2
    sizes = apart(folder / "job", _map_twice, target=Target(url=str(folder / "registry"), cache=folder / "cache"))
    total = sum(size["Pss"] for size in sizes)
    each = ", ".join(f"{size['Rss'] / MIB:.0f} and {size['Pss'] / MIB:.0f}" for size in sizes)
    report(
        "1 GiB map in two processes, sum of PSS, times the map",
        total / map_bytes,
        target="< 1.05",
        holds=total < 1.05 * map_bytes,
        against=f"all pages looked up; RSS and PSS of the mapping in MiB: {each}",
    )


def _publish_map(folder: Path, num_ids: int, seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    with Peak("RssAnon", "RssShmem", every=0.002) as memory:
        hashed = PointerMap.hashed(num_ids=num_ids, num_columns=NUM_COLUMNS, num_rows=2**16, seed=0)
        pointers = rng.integers(0, 2**16, (num_ids, NUM_COLUMNS), dtype=np.uint16)
        table = TableSnapshot(
            pointer_map=hashed.clustered(pointers, hashed.next_helper_hash(0)),
            num_embeddings=num_ids,
            embedding_dim=NUM_COLUMNS,
            feature_names=("ids",),
            pooling="sum",
        )
        started = time.perf_counter()
        _registry(folder).publish({"table": table})
        seconds = time.perf_counter() - started
    return {"peak": memory.grown, "seconds": seconds}


def _open_map(folder: Path) -> dict[str, float]:
    with Peak("RssAnon", "RssShmem", every=0.002) as memory:
        started = time.perf_counter()
        opened = _registry(folder).open()
        seconds = time.perf_counter() - started
        assert opened.tables["table"].pointer_map.num_ids == NUM_IDS
    return {"peak": memory.grown, "seconds": seconds}


def _verify_map(folder: Path) -> dict[str, float]:
    registry = _registry(folder)
    opened = registry.open()
    path = opened.folder / POINTERS
    seconds: dict[str, list[float]] = {}
    actions: dict[str, Callable[[], object]] = {
        "`Registry.verify`": lambda: registry.verify(opened.version),
        '`open(verify="all")`': lambda: registry.open(verify="all"),
        "the command sha256sum": lambda: subprocess.run(["sha256sum", path], check=True, capture_output=True),
    }
    for _ in range(ROUNDS):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            seconds.setdefault(name, []).append(time.perf_counter() - started)
    return {name: path.stat().st_size / statistics.median(times) / 1e9 for name, times in seconds.items()}


def _map_twice(target: Target) -> list[dict[str, int]]:
    gate = multiprocessing.get_context("fork").Barrier(2)
    forks = [Fork(_look_up_every_page, target, gate) for _ in range(2)]
    return [fork.heard() for fork in forks]


def _look_up_every_page(target: Target, gate: Any, say: Callable[[object], None]) -> None:
    pointer_map = target.open().open().tables["table"].pointer_map
    for start in range(0, SHARED_IDS, 2**22):
        pointer_map.codes(np.arange(start, start + 2**22, 256))  # 2 KiB apart
    gate.wait()
    sizes = mapping_bytes(POINTERS)
    gate.wait()
    say(sizes)


def _registry(folder: Path) -> Registry:
    return Registry(folder / "registry", cache=folder / "cache")


if __name__ == "__main__":
    registry_figures()
