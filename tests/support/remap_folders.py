"""Folders of raw files with a registry, and the jobs that remap them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.remap_cases import make_map, make_snapshot
from torchrec_cce.errors import CCEError
from torchrec_cce.jobs.remap.job import remap
from torchrec_cce.jobs.remap.output import read_manifest
from torchrec_cce.jobs.remap.remapper import Remapper
from torchrec_cce.maps.registry import Registry
from torchrec_cce.maps.store import open_store

NAMES = ("day=1/a.parquet", "day=1/b.parquet", "day=2/hour=0/a.parquet")


def write_log(path: Path, seed: int, *, rows: int = 1000, row_group_size: int = 300) -> None:
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = rng.integers(0, 50, rows)
    table = pa.table(
        {
            "label": rng.integers(0, 2, rows),
            "user": pa.array(ids, mask=rng.random(rows) < 0.1),
            "item": pa.array([[int(raw)] * int(raw % 3) for raw in ids], pa.list_(pa.int64())),
            "text": [f"x{raw}" for raw in ids],
        }
    )
    pq.write_table(table, path, row_group_size=row_group_size)


class Place:
    """Raw files and a registry in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.raw, self.registry = folder / "raw", folder / "registry"
        for seed, name in enumerate(NAMES):
            write_log(self.raw / name, seed)
        for name in ("_SUCCESS.parquet", ".part.parquet", "notes.txt", "_tmp/a.parquet"):
            (self.raw / name).parent.mkdir(exist_ok=True)
            (self.raw / name).write_text("not read")
        self.publish()

    def publish(self, **options: Any) -> int:
        tables = {
            "t_user": make_snapshot(make_map(1, **options), "user"),
            "t_item": make_snapshot(make_map(2, num_columns=5, keys=True, unseen="hash"), "item", "user"),
        }
        return Registry(self.registry).publish(tables).version

    def run(self, output: str = "out", **options: Any) -> Any:
        source = options.pop("input", str(self.raw))
        return remap(source, str(self.folder / output), registry=str(self.registry), **options)

    def remapper(self, output: str = "out") -> Remapper:
        remapped = read_manifest(open_store(self.folder / output)).remapped
        tables = Registry(self.registry).open(remapped.version).tables
        return Remapper(format=remapped, maps={name: table.pointer_map for name, table in tables.items()})


def contents(folder: Path) -> dict[str, bytes]:
    """Name → bytes of all files, hidden ones too."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(kind: type[CCEError], call: Callable[[], object]) -> str:
    with pytest.raises(kind) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)
