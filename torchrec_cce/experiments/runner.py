"""A plan run to its end: trials on workers, results in one file, and nothing lost when it is interrupted."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from torchrec_cce.errors import ConfigError, JobError
from torchrec_cce.experiments.agenda import Agenda
from torchrec_cce.experiments.plan import Plan
from torchrec_cce.experiments.results import RESULTS, RUNS, TrialResult, versions, write_results
from torchrec_cce.experiments.trial import Trial, run_trial
from torchrec_cce.files.lock import LOCK, FolderLock
from torchrec_cce.training.command import quiet_libraries
from torchrec_cce.training.input import check_files
from torchrec_cce.workers.inline import InlineEngine
from torchrec_cce.workers.local import LocalEngine

_WRITE_EVERY_S = 5.0
_STOPPING_S = 30.0
"""Within which a trial that was asked to stop writes its checkpoint, to go on from there the next time."""
_DIED = "its process died: killed, or out of memory; run the plan again to try it again"


def bench(
    plan: Plan, folder: Path, *, workers: int = 0, show_progress: bool = True, keep_checkpoints: bool = False
) -> list[TrialResult]:
    """Run the trials of a plan that are not in `folder` yet; the results are then in `results.parquet` there.

    A comparison that is interrupted, at whatever moment, goes on when this is called again, and comes to the same. Of a
    changed plan only what changed is run.

    Args:
        workers: processes of one thread each; 0 runs the trials in this process, each with a progress line.
        keep_checkpoints: of all runs; else a checkpoint is removed when no other run starts from it any more.

    Returns:
        The results of all trials, in the order of the plan; see `chosen_results`.

    Raises:
        ConfigError: another process uses the folder.
        DataFileError: a file of the log is missing.
    """
    check_files(plan.run)  # every trial would find the same out, one after another
    agenda = Agenda(plan, folder / RUNS, keeps_checkpoints=keep_checkpoints)
    with ExitStack() as stack:
        try:
            lock = stack.enter_context(FolderLock(folder / LOCK, what="runs a plan in this folder"))
        except JobError as error:
            raise ConfigError(f"{error}. Or choose another folder") from error
        here, written = versions(), time.monotonic()

        def write() -> None:
            lock.check()
            write_results(folder / RESULTS, agenda.results(), here)

        stack.callback(write)  # also of a comparison that is interrupted
        engine = stack.enter_context(LocalEngine(workers, stopping_s=_STOPPING_S) if workers else InlineEngine())
        bar = stack.enter_context(_bar(show_progress and workers > 0))
        task = bar.add_task("trials", total=agenda.total)

        def trials() -> Iterator[Trial | None]:
            while True:
                trial = agenda.next()
                bar.update(task, completed=agenda.num_ended, total=agenda.total)
                yield None if trial is None else replace(trial, show_progress=show_progress and workers == 0)

        for trial, result in engine.run(
            _run_in_worker if workers else run_trial, trials(), lost=lambda trial: trial.result(_DIED)
        ):
            agenda.record(trial, result)
            if time.monotonic() > written + _WRITE_EVERY_S:
                write()
                written = time.monotonic()
        agenda.drop_checkpoints()
    return agenda.results()


def _run_in_worker(trial: Trial) -> TrialResult:
    torch.set_num_threads(1)
    quiet_libraries()
    return run_trial(trial)


def _bar(visible: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not visible,
    )
