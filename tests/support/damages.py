"""Files damaged in thousands of ways, and what those who read a run's folder then come to."""

import hashlib
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor

from torchrec_cce.errors import CCEError
from torchrec_cce.jobs.checkpoint.reader import CCECheckpoint
from torchrec_cce.maps.registry import Registry
from torchrec_cce.sharding.digests import DIGESTS
from torchrec_cce.training import checkpoint, derive, loop
from torchrec_cce.training.config_file import RUN_CONFIG, read_run_config
from torchrec_cce.training.parallel import process_group
from torchrec_cce.training.run import Run
from torchrec_cce.training.versions import snapshot_of_run

Reader = Callable[[Path], str]
"""From a run's folder to a digest of all that it read there."""


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    """`content` with something wrong: a bit, some bits, its end, a block, or everything."""
    changed = bytearray(content)
    at = rng.randrange(max(1, len(content)))
    kind = rng.choice(["bit", "bit", "bits", "cut", "zeros", "noise", "longer", "empty"])
    if kind == "bit" and content:
        changed[at] ^= 1 << rng.randrange(8)
    elif kind == "bits" and content:
        for _ in range(rng.randrange(2, 20)):
            changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del changed[at:]
    elif kind == "zeros":
        changed[at : at + 64] = bytes(len(changed[at : at + 64]))
    elif kind == "noise":
        changed[at : at + 64] = rng.randbytes(len(changed[at : at + 64]))
    elif kind == "longer":
        changed += rng.randbytes(rng.randrange(1, 99))
    else:
        changed.clear()
    return bytes(changed)


@contextmanager
def damaged(folder: Path, files: list[Path], rng: random.Random) -> Iterator[str]:
    """Damage `files` of a folder, one or two of them, for a while. Yields in words what was done; "" if nothing was."""
    path = rng.choice(files)
    name, before = path.relative_to(folder).as_posix(), path.read_bytes()
    other, others = path, before
    way = rng.choice(["change"] * 8 + ["delete", "swap"])
    if way == "delete":
        path.unlink()
    elif way == "swap":
        other = rng.choice(files)
        others = other.read_bytes()
        path.write_bytes(others)
        other.write_bytes(before)
    else:
        path.write_bytes(damaged_bytes(before, rng))
    is_same = path.exists() and path.read_bytes() == before
    try:
        yield "" if is_same else f"{way} {name}"
    finally:
        path.write_bytes(before)
        if other != path:
            other.write_bytes(others)


def files_of(run: Path) -> list[Path]:
    """What a run's newest checkpoint is read from."""
    folder = checkpoint.newest(run)
    return [run / RUN_CONFIG, *sorted(path for path in folder.rglob("*") if path.is_file())]


def without_digests(run: Path, copy: Path) -> Path:
    """A copy of a run as older versions wrote it."""
    shutil.copytree(run, copy)
    (checkpoint.newest(copy) / DIGESTS).unlink()
    return copy


def _of_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    content = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        for part in [shard.tensor for shard in value.local_shards()] if isinstance(value, ShardedTensor) else [value]:
            content.update(name.encode() + part.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def publish(run: Path) -> str:
    found = snapshot_of_run(run)
    said: list[Any] = [found.config_digest]
    for name, table in sorted(found.tables.items()):
        assert table.weights is not None
        frequencies = None if table.frequencies is None else table.frequencies.tobytes()
        weights = hashlib.sha256(table.weights.tobytes()).hexdigest()
        said.append((name, table.pointer_map.digest, table.entropies, weights, frequencies))
    return str(said)


def recluster(run: Path) -> str:
    """What a job reads before it clusters, its checks of the registry left out: the maps are beside the weights."""
    found = CCECheckpoint.at(run)
    said: list[Any] = []
    for table in found.tables(Registry(str(run / "no-registry"))):
        rows = found.read_rows(table)
        numbers = (hashlib.sha256(each.tobytes()).hexdigest() for each in (rows.weights, *rows.states.values()))
        said.append((table.name, table.config.use_helper, table.snapshot.pointer_map.digest, *numbers))
    return str(said)


def derive_from(run: Path) -> str:
    return _of_tensors(derive._load(run, read_run_config(run)).state_dict())


def evaluate(run: Path) -> str:
    config = read_run_config(run)
    assert config.data.test is not None
    return str(astuple(loop.evaluate(config, run, config.data.test)))


def resume(run: Path) -> str:
    """What `train --resume` starts from."""
    config = read_run_config(run)
    with process_group() as ranks:
        resumed = Run(config, run, ranks)
        resumed.resume()
        tensors = {name: value for name, value in resumed.model.state_dict().items() if isinstance(value, torch.Tensor)}
        counted = {
            name: hashlib.sha256(each.tobytes()).hexdigest() for name, each in resumed.frequencies.totals().items()
        }
        return f"{_of_tensors(tensors)} {resumed.position} {counted}"


READERS: dict[str, Reader] = {
    "publish": publish,
    "recluster": recluster,
    "derive": derive_from,
    "evaluate": evaluate,
    "resume": resume,
}


def outcome(reader: Reader, run: Path) -> tuple[str | None, Exception | None]:
    """What a reader found; or the error that it ended in, if that is no line for a user: a traceback."""
    try:
        return reader(run), None
    except (CCEError, OSError):
        return None, None
    except Exception as error:  # noqa: BLE001  what this looks for
        return None, error


def attack(run: Path, *, tries: int, seed: int, readers: Mapping[str, Reader], may_differ: bool = False) -> list[str]:
    """Damage files of a run's newest checkpoint so many times, and let one of the `readers` read it each time.

    Args:
        may_differ: whether only tracebacks count, as there are no digests to compare with.

    Returns:
        A line for each violation: something else was read without an error, or the error was none that is meant.
    """
    rng = random.Random(seed)
    names = list(readers)
    whole = {name: readers[name](run) for name in names}
    files = files_of(run)
    violations = []
    for number in range(tries):
        name = names[number % len(names)]
        with damaged(run, files, rng) as what:
            found, error = outcome(readers[name], run)
        if error is not None:
            violations.append(f"{name} after {what}: {type(error).__name__}: {error}")
        elif what and found not in (None, whole[name]) and not may_differ:
            violations.append(f"{name} after {what}: something else was read")
    return violations
