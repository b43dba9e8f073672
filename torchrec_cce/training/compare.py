"""The same training run for several methods, caps and seeds: what each is worth on a log."""

import dataclasses
import math
import multiprocessing
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from torchrec_cce.children import end_with_parent
from torchrec_cce.clustering.entropy import random_entropies
from torchrec_cce.config import CCEEmbeddingBagConfig
from torchrec_cce.errors import ConfigError
from torchrec_cce.evaluation.outcome import Entropies, Outcome
from torchrec_cce.sizing import Method
from torchrec_cce.training.config import RunConfig
from torchrec_cce.training.loop import RunResult, train


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a comparison."""

    method: Method
    max_parameters: int | None
    """None for full tables."""
    learning_rate: float
    """Of the embedding tables."""
    seed: int

    @property
    def name(self) -> str:
        cap = "" if self.max_parameters is None else f"-{self.max_parameters}"
        return f"{self.method}{cap}-lr{self.learning_rate:g}-seed{self.seed}"

    def configure(self, base: RunConfig) -> RunConfig:
        """`base` with this trial's choices in place of its own."""
        replace = dataclasses.replace
        return replace(
            base,
            embedding=replace(base.embedding, method=self.method, max_parameters=self.max_parameters),
            optimizer=replace(base.optimizer, embedding_learning_rate=self.learning_rate),
            seed=self.seed,
        )


def compare(
    base: RunConfig,
    *,
    methods: Sequence[Method],
    caps: Sequence[int],
    seeds: Sequence[int],
    learning_rates: Sequence[float],
    folder: Path,
    workers: int = 1,
    show_progress: bool = True,
) -> list[Outcome]:
    """Run every method at every cap from every seed.

    Each method and cap gets the learning rate that does best on the validation split from the first seed: a method that
    is not tuned looks better compressed, or worse, than it is.

    Args:
        base: everything that the runs share; needs validation and test splits. Clusterings are those of its schedule.
        caps: trained parameters of a table at most. Full tables are run once, without a cap.
        folder: each run gets a folder of its own in here.
        workers: processes; with more than one, each has one thread and shows no progress.

    Raises:
        ConfigError: no validation or test split.
    """
    if base.data.validation is None or base.data.test is None:
        raise ConfigError("a comparison needs data.validation and data.test")
    settings = [(method, cap) for method in methods for cap in ([None] if method == "full" else caps)]
    run = _Runner(base, folder, workers, show_progress)
    tuning = [
        Trial(method=method, max_parameters=cap, learning_rate=rate, seed=seeds[0])
        for method, cap in settings
        for rate in learning_rates
    ]
    tuned = dict(zip(tuning, run(tuning), strict=True))
    firsts = [
        min((t for t in tuning if (t.method, t.max_parameters) == setting), key=lambda t: _loss(tuned[t]))
        for setting in settings
    ]
    others = [dataclasses.replace(first, seed=seed) for first in firsts for seed in seeds[1:]]
    tuned |= dict(zip(others, run(others), strict=True))
    return [tuned[dataclasses.replace(first, seed=seed)] for first in firsts for seed in seeds]


def _loss(outcome: Outcome) -> float:
    """What a learning rate is chosen by; a run that diverged is the worst."""
    return math.inf if math.isnan(outcome.validation_bce) else outcome.validation_bce


class _Runner:
    """Runs trials, here or in worker processes, and returns their outcomes in order."""

    def __init__(self, base: RunConfig, folder: Path, workers: int, show_progress: bool) -> None:
        self._base, self._folder, self._workers, self._show_progress = base, folder, workers, show_progress

    def __call__(self, trials: Iterable[Trial]) -> list[Outcome]:
        if self._workers == 1:
            return [self._run(trial, show_progress=self._show_progress) for trial in trials]
        # Spawned, not forked: the parent may hold threads of OpenMP and of readers.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self._workers, mp_context=context, initializer=_begin) as pool:
            return list(pool.map(self._run, trials))

    def _run(self, trial: Trial, *, show_progress: bool = False) -> Outcome:
        config = trial.configure(self._base)
        run_dir = self._folder / trial.name
        started = time.perf_counter()
        result = train(config, run_dir, show_progress=show_progress)
        if result.interrupted:
            raise KeyboardInterrupt
        return _outcome(trial, config, result, run_dir, time.perf_counter() - started)


def _begin() -> None:
    """Of a worker, which shares the machine with others."""
    torch.set_num_threads(1)
    end_with_parent()


def _outcome(trial: Trial, config: RunConfig, result: RunResult, run_dir: Path, seconds: float) -> Outcome:
    best = result.best or {}
    tables = {table.name: table for table in config.table_configs() if isinstance(table, CCEEmbeddingBagConfig)}
    return Outcome(
        method=trial.method,
        max_parameters=trial.max_parameters,
        seed=trial.seed,
        learning_rate=trial.learning_rate,
        validation_bce=best.get("validation_bce", math.nan),
        bce=best.get("test_bce", math.nan),
        auc=best.get("test_auc", math.nan),
        sizes=result.sizes,
        entropies={
            name: Entropies(
                learned=entropies,
                random=random_entropies(tables[name].num_embeddings, tables[name].num_rows, tables[name].num_columns),
            )
            for name, entropies in result.entropies.items()
        },
        steps=result.steps,
        rows_per_second=result.rows_per_second,
        seconds=seconds,
        run_dir=str(run_dir),
    )
