"""A run on one rank: its folder, its model and optimizers, from which it starts or goes on, a step, an evaluation."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import TypeAdapter
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from torchrec_cce.errors import ConfigError, DataFileError
from torchrec_cce.files.atomic import write_json
from torchrec_cce.files.lock import LOCK, FolderLock
from torchrec_cce.maps.registry import MapVersion, Registry
from torchrec_cce.modules.embedding_bag import CCEEmbeddingBagCollection
from torchrec_cce.sharding.admit import admit_sharded, top_up_sharded
from torchrec_cce.sharding.agreement import from_each_rank, on_all_ranks, on_first_rank
from torchrec_cce.sharding.frequencies import ShardedFrequencies
from torchrec_cce.sharding.tables import ShardedMaps, collections_of
from torchrec_cce.training import checkpoint
from torchrec_cce.training.config import RunConfig
from torchrec_cce.training.config_file import RUN_CONFIG, read_run_config
from torchrec_cce.training.data_config import SplitConfig
from torchrec_cce.training.derive import derived_model, start_from
from torchrec_cce.training.input import RankBatch, num_dense, read_batches
from torchrec_cce.training.metrics import Quality, has_measured, quality
from torchrec_cce.training.model import build_model
from torchrec_cce.training.parallel import Ranks, shard
from torchrec_cce.training.placement import plan_run
from torchrec_cce.training.schedule import Position
from torchrec_cce.training.versions import RunVersions

Start = Literal["new", "resume", "either"]
"""`new` begins a run, `resume` goes on from its newest checkpoint, and `either` resumes if there is a checkpoint."""
_PATIENCE_S = 5.0
"""A rank that torchrun restarts may meet the one whose place it takes, which is about to end."""
START = "start.json"
"""In a run's folder: the version that it started from."""


class Run:
    """Model, optimizers, frequencies and position of a run on one rank. Every rank calls every method."""

    def __init__(
        self, config: RunConfig, run_dir: Path, ranks: Ranks, *, check: Callable[[], object] = lambda: None
    ) -> None:
        self.check = check  # called before anything is written
        self.config, self.run_dir, self.ranks = config, run_dir, ranks
        self.plan = plan_run(config, ranks.world_size)  # before there are weights, which may not fit
        model = build_model(config, num_dense=num_dense(config), device=ranks.device)
        self.model: DistributedModelParallel
        self.optimizer: CombinedOptimizer
        self.model, self.optimizer = shard(model, self.plan, config.optimizer, ranks, rates=config.resident_rates)
        self.collections = list(collections_of(self.model).values())
        (self.remap,) = (collection.remap for collection in self.collections)
        self.frequencies = ShardedFrequencies({})  # of each position of a map, if clusterings weigh by them
        self.position = Position()
        self.versions = RunVersions(config, run_dir, self.model, self.optimizer, check=check)

    def begin(self) -> None:
        """Start from the tables of a version or the model of another run, if the configuration names one."""
        url, start = self.config.registry.url, self.config.registry.start
        if url is not None and start is not None:
            opened = open_start(url, start, self.run_dir)
            opened.attach(ShardedMaps(self.model))
            self.position.version = opened.version
            self.position.entropies = {
                name: table.entropies for name, table in opened.tables.items() if table.entropies
            }
        if self.config.derive is not None:
            self.position.entropies = start_from(self.model, derived_model(self.config))
        if self.counts:
            self.frequencies = ShardedFrequencies({name: m.num_ids for name, m in self.versions.maps().items()})
        if self.has_residents and not self.counts_on_the_way:
            for batch in self.batches(self.config.data.train):
                self.frequencies.count(self.remap, batch.part.sparse_features, batch.rows)

    @property
    def has_residents(self) -> bool:
        """Whether tables have residents, now or at times."""
        return bool(self.remap.resident_tables())

    @property
    def counts(self) -> bool:
        """Whether it is known how often each ID was seen."""
        return self.config.recluster.weigh_by_frequency or self.has_residents

    @property
    def counts_on_the_way(self) -> bool:
        """Whether batches are counted when they are trained on; if not, all were counted before."""
        return self.counts and not (self.has_residents and self.config.resident_settings.count_first)

    def admit(self) -> None:
        """Begin a phase of the residents."""
        admit_sharded(self.model, self.optimizer, seed=self.config.seed, frequencies=self.frequencies.totals())

    def count(self, batch: RankBatch) -> None:
        """Count the IDs of a batch that is trained on next."""
        if self.counts_on_the_way:
            self.frequencies.count(self.remap, batch.part.sparse_features, batch.rows)

    def top_up(self) -> None:
        """Give free rows of the open phase to IDs that were counted since it began."""
        if self.counts_on_the_way and any(self.remap.free_rows(table) for table in self.remap.resident_tables()):
            top_up_sharded(self.model, seed=self.config.seed, frequencies=self.frequencies.totals())

    def resume(self) -> None:
        """Go on from the newest checkpoint."""
        counted = self.load()
        if self.counts:
            missing = sorted(self.versions.maps().keys() - counted)
            if missing:
                raise ConfigError(
                    f"{checkpoint.newest(self.run_dir)}: no frequencies of {missing}, which weigh_by_frequency=true "
                    "counts from the first batch on; start a new run"
                )
            self.frequencies = ShardedFrequencies.of(counted)

    def load(self) -> Mapping[str, npt.NDArray[np.int64]]:
        """Read the newest checkpoint into the model. Returns the frequencies that it has."""
        self.position, counted = checkpoint.load(self.run_dir, self.model, self.optimizer)
        return counted

    def forward(self, batch: RankBatch) -> torch.Tensor:
        """This rank's sum of losses on its part of the global batch, for `descend`. Nothing is changed yet."""
        if not self.model.training:  # else it visits every module for nothing
            self.model.train()
        self.optimizer.zero_grad()
        part = batch.part.to(self.ranks.device)
        logits, labels = self.model(part)[: batch.rows], part.labels[: batch.rows]
        return binary_cross_entropy_with_logits(logits, labels, reduction="sum")

    def descend(self, loss: torch.Tensor, batch: RankBatch) -> None:
        """One step on the mean loss of the global batch, from what `forward` returned."""
        # Gradients are averaged over ranks. Scaled like this the average is the gradient of the mean over the global
        # batch, also where the ranks' parts differ in size.
        (loss * (self.ranks.world_size / batch.global_rows)).backward()
        self.optimizer.step()

    @torch.no_grad()
    def quality_on(self, split: SplitConfig) -> Quality:
        """The model's quality on the rows of all ranks; the same on every rank. Residents' private rows are left out:
        what is measured can be published."""
        self.model.eval()
        outputs = []
        self.remap.leaves_out_residents = True
        try:
            for batch in self.batches(split):
                part = batch.part.to(self.ranks.device)
                outputs.append(torch.stack([self.model(part), part.labels])[:, : batch.rows].cpu())
        finally:
            self.remap.leaves_out_residents = False
        if not outputs:
            raise ConfigError(f"{split}: no rows to evaluate on")
        logits, labels = torch.cat(from_each_rank(torch.cat(outputs, dim=1)), dim=1)
        return quality(logits, labels)

    def batches(self, split: SplitConfig) -> Iterator[RankBatch]:
        """This rank's parts of the global batches of `split`."""
        return read_batches(
            self.config,
            split,
            remap=self.remap,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            as_words=all(isinstance(each, CCEEmbeddingBagCollection) and each.takes_words for each in self.collections),
        )


@contextmanager
def owned(run_dir: Path, start: Start) -> Iterator[Callable[[], object]]:
    """Lock the folder of a run while entered; rank 0 holds the lock, and what an earlier run left half written is gone.

    Yields a function that raises JobError on rank 0 once this is no longer the run that the folder belongs to.

    Raises:
        JobError: another process trains here, on all ranks.
    """
    lock: FolderLock | None = None

    def take() -> None:
        nonlocal lock
        if start == "resume" and not run_dir.is_dir():
            return  # there is nothing to resume, which `claim` says
        patience_s = _PATIENCE_S if start == "either" else 0.0
        lock = FolderLock(run_dir / LOCK, what="trains here", patience_s=patience_s)
        checkpoint.sweep(run_dir)

    try:
        on_first_rank(take)
        yield (lambda: None) if lock is None else lock.check
    finally:
        if lock is not None:
            lock.release()


def claim(run_dir: Path, config: RunConfig, start: Start) -> bool:
    """Make `run_dir` the folder of this configuration, or check that it is. Returns whether to resume.

    Raises:
        ConfigError: the folder holds another run or another configuration, or there is nothing to resume.
    """
    if start == "new" and (has_measured(run_dir) or checkpoint.exists(run_dir)):  # a start that failed is no run
        raise ConfigError(f"{run_dir} holds a run already; resume it or choose another folder")
    if start == "new" or (start == "either" and not (run_dir / RUN_CONFIG).exists()):
        (run_dir / START).unlink(missing_ok=True)
        write_json(run_dir / RUN_CONFIG, config.as_dict(), indent=2)
        return False
    asked, started = config.as_dict(), read_run_config(run_dir).as_dict()
    changed = [name for name in asked if asked[name] != started[name]]
    if changed:
        raise ConfigError(f"{run_dir} was started with other values in {changed}; resume with the same configuration")
    return start == "resume" or checkpoint.exists(run_dir)


def open_start(url: str, start: int | str, run_dir: Path) -> MapVersion:
    """Open the version that a new run starts from, on every rank.

    Args:
        start: its number, or `"current"`: the version that is current now, or was when this run was first begun.

    Raises:
        RegistryError: there is no such version, or the registry does not answer.
        MapFileError: the version is damaged.
        ConfigError: the run was begun before, and the registry has another version under that number now.
    """
    registry = Registry(url)
    version = on_first_rank(lambda: _version(registry, start, run_dir))
    return on_all_ranks(lambda: registry.open(version))


def _version(registry: Registry, start: int | str, run_dir: Path) -> int:
    record = run_dir / START
    begun = _begun(record) if record.exists() else None
    wanted = begun.version if begun else None if start == "current" else int(start)
    entry = registry.state().find(wanted)
    if begun and begun.manifest_sha256 != entry.manifest_sha256:
        raise ConfigError(
            f"{run_dir} was begun from version {entry.version} with manifest {begun.manifest_sha256[:12]}; that of "
            f"{registry.url} is {entry.identity}. Choose another folder"
        )
    write_json(record, _Begun(entry.version, entry.manifest_sha256)._asdict())
    return entry.version


class _Begun(NamedTuple):
    """The version that a run was begun from."""

    version: int
    manifest_sha256: str


def _begun(record: Path) -> _Begun:
    try:
        return TypeAdapter(_Begun).validate_python(_Begun(**json.loads(record.read_text())))
    except (ValueError, TypeError, RecursionError) as error:
        raise DataFileError(f"{record}: damaged ({error}); copy the run again") from error
