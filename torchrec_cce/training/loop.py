"""The training loop, for one process and for every rank of many."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from torchrec_cce.clustering.kmeans.kmeans import modules_of
from torchrec_cce.errors import ConfigError, DivergedError
from torchrec_cce.files.atomic import write_json
from torchrec_cce.sharding.agreement import on_first_rank
from torchrec_cce.sharding.recluster import recluster_sharded
from torchrec_cce.training import checkpoint
from torchrec_cce.training.checkpoint import CheckpointWriter
from torchrec_cce.training.config import RunConfig
from torchrec_cce.training.data_config import SplitConfig
from torchrec_cce.training.footprint import peak_training_bytes
from torchrec_cce.training.input import RankBatch, check_files
from torchrec_cce.training.metrics import MetricsLog, ProgressLine, Quality
from torchrec_cce.training.model import Sizes, sizes_of
from torchrec_cce.training.parallel import StopRequest, process_group
from torchrec_cce.training.placement import record_plan
from torchrec_cce.training.run import Run, Start, claim, owned
from torchrec_cce.training.schedule import Schedule
from torchrec_cce.training.unused import check_used

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
        run_dir: must not hold a run yet if `start` is `"new"`.
        start: `"resume"` and `"either"` want the configuration that the run was started with.

    Raises:
        JobError: another process trains in `run_dir`, or has taken it over while this one was asleep.
        ConfigError, MapMismatchError, DataFileError: before the first batch, or at the row that is at fault.
        DivergedError: the loss, or weights that are to be saved, are NaN or infinite.
        MissingExtraError: at once; the clusterings' back end of k-means is not installed.
    """
    if config.recluster.ct > 0:
        modules_of(config.recluster.backend)
    if not checkpoint.exists(run_dir):
        check_used(config)
    with process_group() as ranks, StopRequest() as stop, owned(run_dir, start) as check:
        if ranks.is_first and config.recluster.ct > 0 and not config.embedding.use_helper:
            _log.warning("without helper, clusterings leave the pointers as they are: see embedding.use_helper")
        resume = on_first_rank(lambda: claim(run_dir, config, start))
        run = Run(config, run_dir, ranks, check=check)
        if resume:
            run.resume()
        else:
            run.begin()
        on_first_rank(lambda: check_files(config, run.remap))
        on_first_rank(lambda: record_plan(run.plan, run.model.module, run_dir))
        log = MetricsLog(run_dir if ranks.is_first else None, after=run.position, check=check)
        line = ProgressLine(run_dir.name, visible=show_progress and ranks.is_first)
        with log, line, run.versions.watching(run.position.version):
            result = _Training(run, stop, log, line).to_the_end()
        if ranks.is_first:
            check()
            write_json(run_dir / "result.json", result, indent=2, strict=True)
        return result


def evaluate(config: RunConfig, run_dir: Path, split: SplitConfig) -> Quality:
    """The quality of a run's newest checkpoint on `split`, a stretch of any log of the same layout."""
    with process_group() as ranks:
        run = Run(config, run_dir, ranks)
        run.load()
        return run.quality_on(split)


class _Training:
    """What is done after which batch of a run, from its position to its end, and how that is timed and recorded."""

    def __init__(self, run: Run, stop: StopRequest, log: MetricsLog, line: ProgressLine) -> None:
        self.run, self.stop, self.log, self.line = run, stop, log, line
        self.config, self.position = run.config, run.position
        recluster = self.config.recluster
        self.schedule = Schedule(ct=recluster.ct, cf=recluster.cf, rest=recluster.rest)
        in_background = self.config.training.checkpoint_in_background
        self.writer = CheckpointWriter(run.run_dir, in_background=in_background, check=run.check)
        self.loss = torch.zeros(2, dtype=torch.float64)  # sum and rows since the last record, on this rank
        if run.ranks.is_first:  # the other ranks start from zero, also after a resume, so that the sum stays right
            self.loss += torch.tensor(self.position.loss, dtype=torch.float64)
        self.rows = 0
        self.started = time.perf_counter()
        self.seconds = {"evaluating": 0.0, "clustering": 0.0, "publishing": 0.0, "adopting": 0.0, "saving": 0.0}

    def to_the_end(self) -> RunResult:
        position, training = self.position, self.config.training
        interrupted = False
        self.begin_phase()
        while position.epoch < training.epochs and not self.schedule.ends_after(position.step):
            interrupted = self.train_epoch()
            if interrupted or self.schedule.ends_after(position.step):
                break
            if training.evaluate_every is None:
                self.validate()
            resting = self.schedule.resting_after(position.step)
            if training.early_stopping and resting and position.stopping.stops_after(position.epoch):
                break
            position.epoch, position.batch = position.epoch + 1, 0
        if not interrupted:
            self.validate()
        saved = self.save()
        with self.activity("saving"):
            self.writer.finish()
        self.line.note(f"{position.step:,} batches, {self.rows_per_second():,.0f} rows/s")
        return self.result(saved, interrupted=interrupted)

    def result(self, saved: Path | None, *, interrupted: bool = False) -> RunResult:
        """What the run has come to, with the checkpoint `saved`."""
        position = self.position
        return RunResult(
            best=position.best,
            steps=position.step,
            rows_per_second=self.rows_per_second(),
            recluster_seconds=self.seconds["clustering"],
            entropies=position.entropies,
            sizes=sizes_of(
                self.run.collections,
                training_bytes=peak_training_bytes(self.config),
                bits=None if self.config.derive is None else self.config.derive.bits,
            ),
            interrupted=interrupted,
            checkpoint=str(saved or ""),
        )

    def train_epoch(self) -> bool:
        """Train to the end of the epoch or of the schedule. Returns whether somebody asked to stop before."""
        position, training = self.position, self.config.training
        trained_before = position.batch  # of a resumed epoch
        for number, batch in enumerate(self.run.batches(self.config.data.train), start=1):
            if number <= trained_before:
                continue
            self.run.count(batch)
            if self.schedule.tops_up_before(position.step + 1):
                self.run.top_up()
            stops = self.train_batch(batch)
            position.step, position.batch = position.step + 1, number
            self.rows += batch.global_rows
            self.line.advance(
                batch.global_rows,
                epoch=position.epoch,
                loss=float(self.loss[0] / self.loss[1].clamp(min=1)),
                rows_per_second=self.rows_per_second(),
            )
            if self.is_due(_LOG_EVERY):
                self.record_loss()
            if self.schedule.clusters_after(position.step):
                self.recluster()
            if self.is_due(self.config.registry.watch_every):
                self.adopt()
            if self.is_due(training.evaluate_every):
                self.validate()
            if self.is_due(training.checkpoint_every):
                self.save()
            if stops:
                return True
            if self.schedule.ends_after(position.step):
                break
        if position.step == 0:
            raise ConfigError(f"{self.config.data.train}: no rows to train on")
        self.record_loss()
        return False

    def train_batch(self, batch: RankBatch) -> bool:
        """One step. Returns whether somebody asked to stop after it.

        Raises:
            DivergedError: the loss is no number. The weights are what they were, and there is a checkpoint of them.
        """
        loss = self.run.forward(batch)
        # As often as before, the processor waits for the device once a batch; and the ranks vote once.
        total = loss.item()
        self.stop.has_diverged = not math.isfinite(total)
        stops = self.stop.on_any_rank()
        if self.stop.has_diverged:
            self.give_up()
        self.run.descend(loss, batch)
        self.loss += torch.tensor([total, batch.rows], dtype=torch.float64)
        return stops

    def give_up(self) -> NoReturn:
        """Leave a checkpoint of the last step whose loss was a number, if the weights then were numbers."""
        step = self.position.step
        said = f"the loss of batch {step + 1} is not a finite number"
        try:
            saved = self.save()
            self.writer.finish()
        except DivergedError as error:
            kept = str(error)
        else:
            kept = f"the checkpoint {saved} is of batch {step}, the last before it"
        diverged = DivergedError(
            f"{said}; {kept}. Look for huge values in the dense fields, or lower the learning rates"
        )
        diverged.result = self.result(
            checkpoint.newest(self.run.run_dir) if checkpoint.exists(self.run.run_dir) else None
        )
        raise diverged

    def is_due(self, every: int | None) -> bool:
        """Whether what is done after every so many batches is done now; None is never."""
        return every is not None and self.position.step % every == 0

    def recluster(self) -> None:
        """Cluster the CCE tables, and publish them if there is a registry."""
        run, step = self.run, self.position.step
        residencies = {table: run.remap.residency(table) for table in run.remap.resident_tables()}
        with self.activity("clustering"):
            reports = recluster_sharded(
                run.model,
                run.optimizer,
                seed=self.config.seed,
                frequencies=run.frequencies.totals(),
                settings=self.config.recluster.settings(),
            )
        for table, report in reports.items():
            self.position.entropies[table] = report.entropies
            before = residencies.get(table)
            of_fold = {}
            if before is not None and before.is_open:
                of_fold = {"residents": before.slots.num_slots, "relative_error": report.relative_error}
            self.log.write("recluster", step, table=table, **asdict(report), **of_fold)
        if self.config.registry.url is not None:
            with self.activity("publishing"):
                published = run.versions.publish(reports, run.frequencies)
            self.log.write("publish", step, **published)
            if "error" in published and run.ranks.is_first:
                _log.warning("not published after batch %d: %s", step, published["error"])
        self.begin_phase()

    def begin_phase(self) -> None:
        """Begin the next phase of residents, if it is due: at the start, after a clustering, and where the job
        `recluster` has made the checkpoint."""
        run = self.run
        if run.has_residents and not run.remap.phase_is_open and not self.schedule.resting_after(self.position.step):
            with self.activity("clustering"):
                run.admit()

    def adopt(self) -> None:
        """Adopt the version that is current in the registry, once all ranks have it."""
        adopted, self.run.frequencies = self.run.versions.adopt(self.run.frequencies)
        if adopted is None:
            return
        self.seconds["adopting"] += adopted.seconds
        if adopted.error is not None:
            self.log.write("swap", self.position.step, version=adopted.version, error=adopted.error)
        for table, report in adopted.reports.items():
            self.position.entropies[table] = report.entropies
            self.log.write("swap", self.position.step, version=adopted.version, table=table, **asdict(report))

    def validate(self) -> None:
        """Evaluate on the validation split and, where that is the best so far, on the test split."""
        data, position = self.config.data, self.position
        if position.validated == position.step:
            return
        position.validated = position.step
        best: dict[str, float] = {"step": position.step}
        with self.activity("evaluating"):
            if data.validation is not None:
                found = self.run.quality_on(data.validation)
                self.log.write("validation", position.step, epoch=position.epoch, **asdict(found))
                if not position.stopping.record(position.epoch, found.bce):
                    return
                best |= {"validation_bce": found.bce, "validation_auc": found.auc}
            if data.test is not None:
                found = self.run.quality_on(data.test)
                self.log.write("test", position.step, epoch=position.epoch, **asdict(found))
                best |= {"test_bce": found.bce, "test_auc": found.auc}
        position.best = best

    def save(self) -> Path:
        """Write a checkpoint. Returns its folder, whole or to be."""
        run, position = self.run, self.position
        with self.activity("saving"):
            position.loss = tuple(self.total_loss().tolist())
            position.metrics_bytes = self.log.flush()
            if self.config.registry.watch_every is not None:
                position.version = run.versions.known
            return self.writer.save(run.model, run.optimizer, position, run.frequencies)

    def total_loss(self) -> torch.Tensor:
        """Sum of the losses and number of rows since the last record, over all ranks."""
        total = self.loss.clone()
        dist.all_reduce(total)
        return total

    def record_loss(self) -> None:
        """Log the mean loss since the last record, and begin anew."""
        total = self.total_loss()
        self.loss.zero_()
        if total[1] > 0:
            self.log.write(
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
    def activity(self, name: str) -> Iterator[None]:
        """Show what is done between two batches, and keep its time apart from that of training."""
        self.line.note(name)
        started = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - started
