"""A run on one rank: its model and optimizers, from which it starts or goes on, one step, and one evaluation."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from torchrec_cce.errors import ConfigError
from torchrec_cce.sharding.frequencies import ShardedFrequencies
from torchrec_cce.sharding.recluster import admit_sharded
from torchrec_cce.sharding.tables import ShardedMaps, collections_of
from torchrec_cce.training import checkpoint
from torchrec_cce.training.config import ResidentsSection, RunConfig, SplitConfig
from torchrec_cce.training.derive import derived_model, start_from
from torchrec_cce.training.input import RankBatch, num_dense, read_batches
from torchrec_cce.training.metrics import Quality, quality
from torchrec_cce.training.model import build_model
from torchrec_cce.training.parallel import Ranks, shard
from torchrec_cce.training.placement import plan_run
from torchrec_cce.training.run_folder import open_start
from torchrec_cce.training.schedule import Position
from torchrec_cce.training.versions import RunVersions


class Run:
    """Model, optimizers, frequencies and position of a run on one rank. Every rank calls every method."""

    def __init__(self, config: RunConfig, run_dir: Path, ranks: Ranks) -> None:
        self.config, self.run_dir, self.ranks = config, run_dir, ranks
        self.plan = plan_run(config, ranks.world_size)  # before there are weights, which may not fit
        model = build_model(config, num_dense=num_dense(config), device=ranks.device)
        self.model: DistributedModelParallel
        self.optimizer: CombinedOptimizer
        self.model, self.optimizer = shard(
            model, self.plan, config.optimizer, ranks, residents_rate=config.residents_rate
        )
        self.collections = list(collections_of(self.model).values())
        (self.remap,) = (collection.remap for collection in self.collections)
        self.frequencies = ShardedFrequencies({})  # of each position of a map, if clusterings weigh by them
        self.position = Position()
        self.versions = RunVersions(config, run_dir, self.model, self.optimizer)

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
        if self.has_residents:
            if not self.counts_on_the_way:
                for batch in self.batches(self.config.data.train):
                    self.frequencies.count(self.remap, batch.part.sparse_features, batch.rows)
            self.admit()

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
        section = self.config.residents or ResidentsSection()
        return self.counts and not (self.has_residents and section.count_first)

    def admit(self) -> None:
        """Begin a phase of the residents."""
        admit_sharded(self.model, self.optimizer, seed=self.config.seed, frequencies=self.frequencies.totals())

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

    def step(self, batch: RankBatch) -> torch.Tensor:
        """One step on the mean loss of the global batch. Returns this rank's sum of losses and its rows, `[2]`."""
        self.model.train()
        self.optimizer.zero_grad()
        if self.counts_on_the_way:
            self.frequencies.count(self.remap, batch.part.sparse_features, batch.rows)
        part = batch.part.to(self.ranks.device)
        logits, labels = self.model(part)[: batch.rows], part.labels[: batch.rows]
        loss = binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        # Gradients are averaged over ranks. Scaled like this the average is the gradient of the mean over the global
        # batch, also where the ranks' parts differ in size.
        (loss * (self.ranks.world_size / batch.global_rows)).backward()
        self.optimizer.step()
        return torch.tensor([loss.item(), batch.rows], dtype=torch.float64)

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
        gathered: list[torch.Tensor] = [torch.empty(0)] * self.ranks.world_size
        dist.all_gather_object(gathered, torch.cat(outputs, dim=1))
        logits, labels = torch.cat(gathered, dim=1)
        return quality(logits, labels)

    def batches(self, split: SplitConfig) -> Iterator[RankBatch]:
        """This rank's parts of the global batches of `split`."""
        return read_batches(
            self.config, split, remap=self.remap, rank=self.ranks.rank, world_size=self.ranks.world_size
        )
