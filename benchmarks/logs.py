"""The logs for the benchmarks: they are read, split, and written with dense IDs as Parquet.

The project may not ship the real logs: they are read from the folder in TORCHREC_CCE_DATA.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from torchrec_cce.data.criteo import read_criteo
from torchrec_cce.data.parquet import read_parquet
from torchrec_cce.data.rows import Column, Rows, concat
from torchrec_cce.data.tsv import DENSE_FEATURES
from torchrec_cce.experiments.dense_ids import DenseIDs, write_dense
from torchrec_cce.experiments.planted_log import write_click_log
from torchrec_cce.files.atomic import atomic_path
from torchrec_cce.hashing import UniversalHash, derive_seed

DATA = "TORCHREC_CCE_DATA"
PLANS = Path(__file__).with_name("plans")
SPLITS = ("train", "validation", "test")
_TABLES = "tables.json"


@dataclass(frozen=True, kw_only=True)
class Log:
    """A log, and how its splits are made."""

    about: str
    """The rows that are used, and the split."""
    prepare: Callable[[Path, Path], DenseIDs]
    """(folder of the logs, folder to write to) → the numbering of the IDs in the three files of `SPLITS` it wrote."""
    dense: tuple[str, ...] = ()
    is_made: bool = False
    """Whether the log is made here and needs no file."""

    @property
    def is_there(self) -> bool:
        return self.is_made or DATA in os.environ

    def sections(self, folder: Path) -> dict[str, Any]:
        """The sections `data` and `tables` of a run on it, whose files are in `folder`: written if they are not yet."""
        if not (folder / _TABLES).exists():
            with atomic_path(folder) as temporary:
                temporary.mkdir()
                numbering = self.prepare(Path(os.environ.get(DATA, ".")), temporary)
                (temporary / _TABLES).write_text(json.dumps(numbering.num_embeddings))
        splits = {split: {"path": str(folder / f"{split}.parquet")} for split in SPLITS}
        return {
            "data": {"format": "parquet", "dense": list(self.dense), **splits},
            "tables": json.loads((folder / _TABLES).read_text()),
        }


def prepare_planted(_source: Path, folder: Path) -> DenseIDs:
    """A made log with clusters: 160,000 rows to train on, 20,000 to choose by, and 20,000 to test on."""
    log = folder / "clicks.tsv"
    write_click_log(log, num_rows=200_000, seed=0)
    stretches = {"train": (0, 160_000), "validation": (160_000, 20_000), "test": (180_000, None)}
    return _write_criteo(log, folder, stretches)


def prepare_criteo(source: Path, folder: Path) -> DenseIDs:
    """In time order, 56,000 rows to train on, 8,000 to choose by, and the last 16,000 to test on."""
    log = source / "criteo_80k" / "criteo_80k.tsv.gz"
    stretches = {"train": (0, 56_000), "validation": (56_000, 8_000), "test": (64_000, None)}
    return _write_criteo(log, folder, stretches)


def prepare_globo(source: Path, folder: Path) -> DenseIDs:
    """Every eighth user by a hash; 85, 5 and 10 % of the pairs by a hash of their number; training rows shuffled."""
    features = ("user", "article", "env", "device", "os", "country", "region", "referrer")
    return _prepare_globo(source, folder, features=features, share=1 / 8)


def prepare_globo_pairs(source: Path, folder: Path) -> DenseIDs:
    """All users and articles, and nothing else; split as `prepare_globo` does."""
    return _prepare_globo(source, folder, features=("user", "article"), share=1.0)


def _prepare_globo(source: Path, folder: Path, *, features: Sequence[str], share: float) -> DenseIDs:
    rows = concat(list(read_parquet(source / "globo" / "globo_ctr.parquet", label="label", ids=_same(features))))
    pairs = np.arange(len(rows)) // 2
    kept = np.flatnonzero(chance(rows.ids["user"].values, "globo users") < share)
    parts = split_by_chance(chance(pairs[kept], "globo pairs"), validation=0.05, test=0.1)
    parts["train"] = np.random.default_rng(0).permutation(parts["train"])
    return _write({split: take(rows, kept[part]) for split, part in parts.items()}, folder)


def prepare_gowalla(source: Path, folder: Path) -> DenseIDs:
    """Every second user by a hash; of the training file, 4 % of the rows by a hash of their number to choose."""
    return _prepare_gowalla(source, folder, share=1 / 2)


def prepare_all_of_gowalla(source: Path, folder: Path) -> DenseIDs:
    """Of the training file, 4 % of the rows by a hash of their number to choose."""
    return _prepare_gowalla(source, folder, share=1.0)


def _prepare_gowalla(source: Path, folder: Path, *, share: float) -> DenseIDs:
    opened = {
        split: concat(
            list(read_parquet(source / "gowalla" / f"{split}.parquet", label="label", ids=_same(("user", "item"))))
        )
        for split in ("train", "test")
    }
    kept = {
        split: np.flatnonzero(chance(rows.ids["user"].values, "gowalla users") < share)
        for split, rows in opened.items()
    }
    parts = split_by_chance(chance(kept["train"], "gowalla rows"), validation=0.04, test=0.0)
    return _write(
        {
            "train": take(opened["train"], kept["train"][parts["train"]]),
            "validation": take(opened["train"], kept["train"][parts["validation"]]),
            "test": take(opened["test"], kept["test"]),
        },
        folder,
    )


def chance(keys: npt.NDArray[np.int64], purpose: str) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each of `keys: [N]`, the same for equal keys, and another function for each purpose."""
    resolution = 1 << 32
    return (
        UniversalHash.from_seed(derive_seed(purpose), num_columns=1, num_rows=resolution).numpy(keys)[:, 0] / resolution
    )


def split_by_chance(
    chances: npt.NDArray[np.float64], *, validation: float, test: float
) -> dict[str, npt.NDArray[np.int64]]:
    """Split → positions in `chances: [N]`, ascending; the shares are of the expected rows."""
    return {
        "train": np.flatnonzero(chances >= test + validation),
        "validation": np.flatnonzero((test <= chances) & (chances < test + validation)),
        "test": np.flatnonzero(chances < test),
    }


def take(rows: Rows, positions: npt.NDArray[np.int64]) -> Rows:
    """The rows at `positions`, in that order, of a log with one ID in every bag."""
    return Rows(
        labels=rows.labels[positions],
        dense=rows.dense[positions],
        ids={feature: Column(values=column.values[positions]) for feature, column in rows.ids.items()},
    )


def _same(names: Sequence[str]) -> dict[str, str]:
    return {name: name for name in names}


def _write_criteo(log: Path, folder: Path, stretches: Mapping[str, tuple[int, int | None]]) -> DenseIDs:
    """Stretches are (rows to skip, rows to read or None for all that follow)."""
    return write_dense(
        {
            folder / f"{split}.parquet": partial(read_criteo, log, skip_rows=skip, max_rows=rows)
            for split, (skip, rows) in stretches.items()
        },
        dense=DENSE_FEATURES,
    )


def _write(splits: Mapping[str, Rows], folder: Path) -> DenseIDs:
    def opener(rows: Rows) -> Callable[[], Iterator[Rows]]:
        return lambda: iter([rows])

    return write_dense({folder / f"{split}.parquet": opener(rows) for split, rows in splits.items()})


LOGS: Mapping[str, Log] = {
    "planted": Log(
        about="200,000 made rows in Criteo's layout with planted clusters, split 80:10:10 in order",
        prepare=prepare_planted,
        dense=DENSE_FEATURES,
        is_made=True,
    ),
    "criteo_80k": Log(
        about="80,000 rows of Criteo Kaggle in time order: 56,000 to train, 8,000 to choose, 16,000 to test",
        prepare=prepare_criteo,
        dense=DENSE_FEATURES,
    ),
    "globo": Log(
        about="an eighth of the users of the Globo.com log, all their pairs, which are split 85:5:10 by a hash",
        prepare=prepare_globo,
    ),
    "globo_pairs": Log(
        about="users and articles of the Globo.com log, all its pairs, which are split 85:5:10 by a hash",
        prepare=prepare_globo_pairs,
    ),
    "gowalla_all": Log(
        about="all of Gowalla in the split of the file, 4 % of its training rows to choose",
        prepare=prepare_all_of_gowalla,
    ),
    "gowalla": Log(
        about="half of the users of Gowalla in the split of the file, 4 % of its training rows to choose",
        prepare=prepare_gowalla,
    ),
}
