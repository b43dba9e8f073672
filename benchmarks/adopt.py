"""What a live model loses and gains by adopting a map that was clustered from its weights of a while ago."""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.figure import report
from tests.support.launch import on_ranks
from torchrec_cce.data.tsv import CATEGORICAL_FEATURES
from torchrec_cce.experiments.planted_log import SyntheticLog, write_click_log
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.sharding.frequencies import ShardedFrequencies
from torchrec_cce.sharding.recluster import adopt_sharded, recluster_sharded
from torchrec_cce.sharding.tables import ShardedMaps, collections_of
from torchrec_cce.training import checkpoint
from torchrec_cce.training.checkpoint import CheckpointWriter
from torchrec_cce.training.config import RunConfig, parse_config
from torchrec_cce.training.data_config import SplitConfig
from torchrec_cce.training.input import RankBatch, num_dense, read_batches
from torchrec_cce.training.model import build_model
from torchrec_cce.training.parallel import process_group, shard
from torchrec_cce.training.placement import plan_run
from torchrec_cce.training.schedule import Position

BATCH_SIZE = 256
FIRST, HOUR, REST = 150, 150, 50
"""Batches: to the first clustering, and on to the moment that the version is of; to its arrival; and after it."""
NUM_ROWS = BATCH_SIZE * (2 * FIRST + HOUR + REST)
VALIDATION_ROWS = 30_000
CAP = 4000
SEEDS = (0, 1, 2)


def adopt_figures() -> None:
    what = (
        f"planted log of {NUM_ROWS:,} rows, a version clustered from weights of {HOUR} batches ago, mean of "
        f"{len(SEEDS)} seeds"
    )
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.tsv"
        write_click_log(log, num_rows=NUM_ROWS + VALIDATION_ROWS, seed=0)
        found: list[dict[str, tuple[float, float]]] = []
        for seed in SEEDS:
            (rank,) = on_ranks(Path(folder) / f"seed-{seed}", 1, _live, log, seed, Path(folder))
            assert rank.code == 0, rank.stderr
            found.append(rank.value)
    at_once, later = ({way: sum(losses[way][i] for losses in found) / len(SEEDS) for way in WAYS} for i in range(2))
    report("adoption, validation BCE before", at_once["stay"], against=what)
    for moment, bce in (("", at_once), (f" and {REST} batches", later)):
        report(
            f"adoption, validation BCE after it{moment}",
            bce["adopt"],
            target="≤ that with the version's own codewords",
            holds=bce["adopt"] <= bce["stale"],
            against=f"the version as it was published: {bce['stale']:.4f}; a clustering of today's weights instead: "
            f"{bce['fresh']:.4f}; no adoption: {bce['stay']:.4f}; {what}",
        )


def _stay(_live: "_Live", _version: dict[str, TableSnapshot]) -> None:
    """Keep the old map."""


def _adopt(live: "_Live", version: dict[str, TableSnapshot]) -> None:
    adopt_sharded(live.model, live.optimizer, version)


def _attach(live: "_Live", version: dict[str, TableSnapshot]) -> None:
    ShardedMaps(live.model).restore(version)


def _recluster(live: "_Live", _version: dict[str, TableSnapshot]) -> None:
    recluster_sharded(live.model, live.optimizer, seed=live.config.seed)


WAYS: dict[str, Callable[["_Live", dict[str, TableSnapshot]], None]] = {
    "stay": _stay,
    "adopt": _adopt,
    "stale": _attach,
    "fresh": _recluster,
}


def _live(log: Path, seed: int, folder: Path) -> dict[str, tuple[float, float]]:
    """Way → the validation BCE at the moment of the adoption, and some batches later."""
    os.environ["TORCHREC_CCE_CACHE"] = str(folder)
    config = parse_config(
        {
            "data": {
                "format": "criteo",
                "train": {"path": str(log), "max_rows": NUM_ROWS},
                "validation": {"path": str(log), "skip_rows": NUM_ROWS},
            },
            "tables": dict(zip(CATEGORICAL_FEATURES, SyntheticLog().universes, strict=True)),
            "embedding": {"max_parameters": CAP},
            "training": {"batch_size": BATCH_SIZE},
            "seed": seed,
        }
    )
    with process_group() as ranks:
        model = build_model(config, num_dense=num_dense(config), device=ranks.device)
        live = _Live(*shard(model, plan_run(config, 1), config.optimizer, ranks), config)
        batches = live.read(config.data.train)
        live.train(islice(batches, FIRST))
        _recluster(live, {})
        live.train(islice(batches, FIRST))
        version = live.clustered_copy(folder / f"then-{seed}")
        live.train(islice(batches, HOUR))
        rest = list(batches)
        writer = CheckpointWriter(folder / f"now-{seed}")
        writer.save(live.model, live.optimizer, Position(), ShardedFrequencies({}))
        found = {}
        for way, move in WAYS.items():
            checkpoint.load(folder / f"now-{seed}", live.model, live.optimizer)
            move(live, version)
            at_once = live.bce()
            live.train(rest)
            found[way] = at_once, live.bce()
        return found


class _Live:
    """A model that trains."""

    def __init__(self, model: Any, optimizer: Any, config: RunConfig) -> None:
        self.model, self.optimizer, self.config = model, optimizer, config

    def train(self, batches: Iterable[RankBatch]) -> None:
        self.model.train()
        for batch in batches:
            self.optimizer.zero_grad()
            binary_cross_entropy_with_logits(self.model(batch.part), batch.part.labels).backward()
            self.optimizer.step()

    def clustered_copy(self, run_dir: Path) -> dict[str, TableSnapshot]:
        """The tables that another job makes of a checkpoint of this moment."""
        CheckpointWriter(run_dir).save(self.model, self.optimizer, Position(), ShardedFrequencies({}))
        reports = recluster_sharded(self.model, self.optimizer, seed=self.config.seed)
        version = ShardedMaps(self.model).snapshot(reports)
        checkpoint.load(run_dir, self.model, self.optimizer)
        return version

    @torch.no_grad()
    def bce(self) -> float:
        assert self.config.data.validation is not None
        self.model.eval()
        parts = [(self.model(batch.part), batch.part.labels) for batch in self.read(self.config.data.validation)]
        logits, labels = (torch.cat(each) for each in zip(*parts, strict=True))
        return float(binary_cross_entropy_with_logits(logits, labels))

    def read(self, split: SplitConfig) -> Iterator[RankBatch]:
        (collection,) = collections_of(self.model).values()
        return read_batches(self.config, split, remap=collection.remap, rank=0, world_size=1)


if __name__ == "__main__":
    adopt_figures()
