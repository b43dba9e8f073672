"""The training loop, for one process and for every rank of many."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from torchrec_cce.clustering.kmeans.kmeans import modules_of
from torchrec_cce.errors import ConfigError
from torchrec_cce.files.atomic import write_json
from torchrec_cce.sharding.agreement import on_first_rank
from torchrec_cce.sharding.frequencies import ShardedFrequencies
from torchrec_cce.sharding.recluster import recluster_sharded
from torchrec_cce.sharding.tables import ShardedMaps, collections_of
from torchrec_cce.training import checkpoint
from torchrec_cce.training.checkpoint_writer import CheckpointWriter
from torchrec_cce.training.config import RunConfig, SplitConfig
from torchrec_cce.training.derive import derived_model, start_from
from torchrec_cce.training.input import RankBatch, check_files, num_dense, read_batches
from torchrec_cce.training.interrupt import StopRequest
from torchrec_cce.training.log import MetricsLog, ProgressLine
from torchrec_cce.training.metrics import Quality, quality
from torchrec_cce.training.model import build_model
from torchrec_cce.training.parallel import Ranks, process_group, shard
from torchrec_cce.training.placement import plan_run, record_plan
from torchrec_cce.training.run_folder import Start, claim, open_start
from torchrec_cce.training.schedule import Position, Schedule
from torchrec_cce.training.sizes import Sizes, sizes_of
from torchrec_cce.training.versions import RunVersions

_log = logging.getLogger(__name__)
_LOG_EVERY = 50
"""Batches between two records of the training loss."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run came to."""

    best: dict[str, float] | None
    """`step`, `validation_bce`, `validation_auc`, `test_bce`, `test_auc` at the lowest validation BCE, as far as these
    splits are configured; without a validation split, at the end."""
    steps: int
    rows_per_second: float
    """Trained rows over wall seconds, reading included; evaluations, clusterings and checkpoints left out."""
    recluster_seconds: float
    entropies: dict[str, tuple[float, ...]]
    """CCE table → `H1 … Hc` after its last clustering."""
    sizes: Sizes
    interrupted: bool
    checkpoint: str


def train(config: RunConfig, run_dir: Path, *, start: Start = "new", show_progress: bool = True) -> RunResult:
    """Train as `config` says and leave checkpoint, maps, metrics, result and configuration in `run_dir`.

    Call it in one process, or in every rank that `torchrun` starts; both compute the same losses. The first Ctrl-C or
    SIGTERM ends training after the batch at hand, with a checkpoint to resume from.

    Args:
        run_dir: must not hold a run, if it is to be `"new"`.
        start: `"resume"` and `"either"` want the configuration that the run was started with.

    Raises:
        ConfigError, MapMismatchError, DataFileError: before the first batch, or at the row that is at fault.
        MissingExtraError: at once; the clusterings' back end of k-means is not installed.
    """
    if config.recluster.ct > 0:
        modules_of(config.recluster.backend)
    with process_group() as ranks, StopRequest() as stop:
        if ranks.is_first and config.recluster.ct > 0 and not config.embedding.use_helper:
            _log.warning("without helper, clusterings leave the pointers as they are: see embedding.use_helper")
        resume = on_first_rank(lambda: claim(run_dir, config, start))
        run = _Run(config, run_dir, ranks)
        if resume:
            run.resume()
        else:
            run.begin()
        on_first_rank(lambda: check_files(config, run.remap))
        on_first_rank(lambda: record_plan(run.plan, run_dir))
        log = MetricsLog(run_dir if ranks.is_first else None, after=run.position)
        line = ProgressLine(run_dir.name, visible=show_progress and ranks.is_first)
        with log, line, run.versions.watching(run.position.version):
            result = run.to_the_end(stop, log, line)
        if ranks.is_first:
            write_json(run_dir / "result.json", result, indent=2)
        return result


def evaluate(config: RunConfig, run_dir: Path, split: SplitConfig) -> Quality:
    """The quality of a run's newest checkpoint on `split`, a stretch of any log of the same layout."""
    with process_group() as ranks:
        run = _Run(config, run_dir, ranks)
        run.load()
        return run.quality_on(split)


class _Run:
    """One run on one rank."""

    def __init__(self, config: RunConfig, run_dir: Path, ranks: Ranks) -> None:
        self.config, self.run_dir, self.ranks = config, run_dir, ranks
        self.plan = plan_run(config, ranks.world_size)  # before there are weights, which may not fit
        model = build_model(config, num_dense=num_dense(config), device=ranks.device)
        self.model: DistributedModelParallel
        self.optimizer: CombinedOptimizer
        self.model, self.optimizer = shard(model, self.plan, config.optimizer, ranks)
        self.collections = list(collections_of(self.model).values())
        (self.remap,) = (collection.remap for collection in self.collections)
        self.frequencies = ShardedFrequencies({})  # of each row of a map, if clusterings weigh by them
        self.schedule = Schedule(ct=config.recluster.ct, cf=config.recluster.cf, rest=config.recluster.rest)
        self.position = Position()
        self.writer = CheckpointWriter(run_dir, in_background=config.training.checkpoint_in_background)
        self.versions = RunVersions(config, run_dir, self.model, self.optimizer)
        self.loss = torch.zeros(2, dtype=torch.float64)  # sum and rows since the last record, on this rank
        self.rows = 0
        self.started = time.perf_counter()
        self.seconds = {"evaluating": 0.0, "clustering": 0.0, "publishing": 0.0, "moving": 0.0, "saving": 0.0}

    def begin(self) -> None:
        """Start from the tables of a version or the model of a run, if the configuration names one."""
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
        if self.config.recluster.weigh_by_frequency:
            self.frequencies = ShardedFrequencies({name: one.num_ids for name, one in self.versions.maps().items()})

    def resume(self) -> None:
        """Go on from the newest checkpoint."""
        counted = self.load()
        if self.config.recluster.weigh_by_frequency:
            missing = sorted(self.versions.maps().keys() - counted)
            if missing:
                raise ConfigError(
                    f"{checkpoint.newest(self.run_dir)}: no frequencies of {missing}, which weigh_by_frequency=true "
                    "counts from the first batch on; start a new run"
                )
            self.frequencies = ShardedFrequencies.of(counted)
        if self.ranks.is_first:  # the other ranks start from zero again, so that the sum stays right
            self.loss += torch.tensor(self.position.loss, dtype=torch.float64)

    def load(self) -> Mapping[str, npt.NDArray[np.int64]]:
        """Go back to the newest checkpoint. Returns the frequencies that lie there."""
        self.position, counted = checkpoint.load(self.run_dir, self.model, self.optimizer)
        return counted

    def save(self, log: MetricsLog, line: ProgressLine) -> Path:
        with self.activity("saving", line):
            self.position.loss = tuple(self.total_loss().tolist())
            self.position.metrics_bytes = log.size()
            if self.config.registry.watch_every is not None:
                self.position.version = self.versions.known
            return self.writer.save(self.model, self.optimizer, self.position, self.frequencies)

    def to_the_end(self, stop: StopRequest, log: MetricsLog, line: ProgressLine) -> RunResult:
        position, training = self.position, self.config.training
        self.started = time.perf_counter()
        interrupted = False
        while position.epoch < training.epochs and not self.schedule.ends_after(position.step):
            interrupted = self.train_epoch(stop, log, line)
            if interrupted or self.schedule.ends_after(position.step):
                break
            if training.evaluate_every is None:
                self.validate(log, line)
            resting = self.schedule.resting_after(position.step)
            if training.early_stopping and resting and position.stopping.stops_after(position.epoch):
                break
            position.epoch, position.batch = position.epoch + 1, 0
        if not interrupted:
            self.validate(log, line)
        saved = self.save(log, line)
        with self.activity("saving", line):
            self.writer.finish()
        line.note(f"{position.step:,} batches, {self.rows_per_second():,.0f} rows/s")
        return RunResult(
            best=position.best,
            steps=position.step,
            rows_per_second=self.rows_per_second(),
            recluster_seconds=self.seconds["clustering"],
            entropies=position.entropies,
            sizes=sizes_of(self.collections),
            interrupted=interrupted,
            checkpoint=str(saved),
        )

    def train_epoch(self, stop: StopRequest, log: MetricsLog, line: ProgressLine) -> bool:
        """Train to the end of the epoch or of the schedule. Returns whether somebody asked to stop before."""
        position = self.position
        evaluate_every, checkpoint_every = self.config.training.evaluate_every, self.config.training.checkpoint_every
        watch_every = self.config.registry.watch_every
        trained_before = position.batch  # of a resumed epoch
        for number, batch in enumerate(self.batches(self.config.data.train), start=1):
            if number <= trained_before:
                continue
            self.loss += self.step(batch)
            position.step, position.batch = position.step + 1, number
            self.rows += batch.global_rows
            line.advance(
                batch.global_rows,
                epoch=position.epoch,
                loss=float(self.loss[0] / self.loss[1].clamp(min=1)),
                rows_per_second=self.rows_per_second(),
            )
            if position.step % _LOG_EVERY == 0:
                self.record_loss(log)
            if self.schedule.clusters_after(position.step):
                self.recluster(log, line)
            if watch_every is not None and position.step % watch_every == 0:
                self.follow(log)
            if evaluate_every is not None and position.step % evaluate_every == 0:
                self.validate(log, line)
            if checkpoint_every is not None and position.step % checkpoint_every == 0:
                self.save(log, line)
            if stop.on_any_rank():
                return True
            if self.schedule.ends_after(position.step):
                break
        if position.step == 0:
            raise ConfigError(f"{self.config.data.train}: no rows to train on")
        self.record_loss(log)
        return False

    def step(self, batch: RankBatch) -> torch.Tensor:
        """One step on the mean loss of the global batch. Returns this rank's sum of losses and its rows, `[2]`."""
        self.model.train()
        self.optimizer.zero_grad()
        self.frequencies.count(self.remap, batch.part.sparse_features, batch.rows)
        part = batch.part.to(self.ranks.device)
        logits, labels = self.model(part)[: batch.rows], part.labels[: batch.rows]
        loss = binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        # Gradients are averaged over ranks. Scaled like this the average is the gradient of the mean over the global
        # batch, also where the ranks' parts differ in size.
        (loss * (self.ranks.world_size / batch.global_rows)).backward()
        self.optimizer.step()
        return torch.tensor([loss.item(), batch.rows], dtype=torch.float64)

    def recluster(self, log: MetricsLog, line: ProgressLine) -> None:
        with self.activity("clustering", line):
            reports = recluster_sharded(
                self.model,
                self.optimizer,
                seed=self.config.seed,
                frequencies=self.frequencies.totals(),
                settings=self.config.recluster.settings(),
            )
        for table, report in reports.items():
            self.position.entropies[table] = report.entropies
            log.write("recluster", self.position.step, table=table, **asdict(report))
        if self.config.registry.url is not None:
            with self.activity("publishing", line):
                published = self.versions.publish(reports, self.frequencies)
            log.write("publish", self.position.step, **published)
            if "error" in published and self.ranks.is_first:
                _log.warning("not published after batch %d: %s", self.position.step, published["error"])

    def follow(self, log: MetricsLog) -> None:
        """Move to the version that is current in the registry, once all ranks have it."""
        moved, self.frequencies = self.versions.follow(self.frequencies)
        if moved is None:
            return
        self.seconds["moving"] += moved.seconds
        if moved.error is not None:
            log.write("swap", self.position.step, version=moved.version, error=moved.error)
        for table, report in moved.reports.items():
            self.position.entropies[table] = report.entropies
            log.write("swap", self.position.step, version=moved.version, table=table, **asdict(report))

    def validate(self, log: MetricsLog, line: ProgressLine) -> None:
        """Evaluate on the validation split and, where that is the best so far, on the test split."""
        data, position = self.config.data, self.position
        if position.validated == position.step:
            return
        position.validated = position.step
        best: dict[str, float] = {"step": position.step}
        with self.activity("evaluating", line):
            if data.validation is not None:
                found = self.quality_on(data.validation)
                log.write("validation", position.step, epoch=position.epoch, **asdict(found))
                if not position.stopping.record(position.epoch, found.bce):
                    return
                best |= {"validation_bce": found.bce, "validation_auc": found.auc}
            if data.test is not None:
                found = self.quality_on(data.test)
                log.write("test", position.step, epoch=position.epoch, **asdict(found))
                best |= {"test_bce": found.bce, "test_auc": found.auc}
        position.best = best

    @torch.no_grad()
    def quality_on(self, split: SplitConfig) -> Quality:
        """Over the rows of all ranks, the same on every rank."""
        self.model.eval()
        outputs = []
        for batch in self.batches(split):
            part = batch.part.to(self.ranks.device)
            outputs.append(torch.stack([self.model(part), part.labels])[:, : batch.rows].cpu())
        if not outputs:
            raise ConfigError(f"{split}: no rows to evaluate on")
        gathered: list[torch.Tensor] = [torch.empty(0)] * self.ranks.world_size
        dist.all_gather_object(gathered, torch.cat(outputs, dim=1))
        logits, labels = torch.cat(gathered, dim=1)
        return quality(logits, labels)

    def batches(self, split: SplitConfig) -> Iterator[RankBatch]:
        return read_batches(
            self.config, split, remap=self.remap, rank=self.ranks.rank, world_size=self.ranks.world_size
        )

    def total_loss(self) -> torch.Tensor:
        """Sum of the losses and number of rows since the last record, over all ranks."""
        total = self.loss.clone()
        dist.all_reduce(total)
        return total

    def record_loss(self, log: MetricsLog) -> None:
        """Log the mean loss since the last record, and begin anew."""
        total = self.total_loss()
        self.loss.zero_()
        if total[1] > 0:
            log.write(
                "train",
                self.position.step,
                epoch=self.position.epoch,
                bce=float(total[0] / total[1]),
                rows_per_second=self.rows_per_second(),
            )

    def rows_per_second(self) -> float:
        training = time.perf_counter() - self.started - sum(self.seconds.values())
        return self.rows / training

    @contextmanager
    def activity(self, name: str, line: ProgressLine) -> Iterator[None]:
        """Keep apart the time that is not training."""
        line.note(name)
        started = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - started
