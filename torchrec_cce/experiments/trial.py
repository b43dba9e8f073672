"""One run of a comparison, in a folder of its own that says how it ended."""

import json
import math
import os
import shutil
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchrec_cce.clustering.entropy import random_entropies
from torchrec_cce.errors import CCEError, ClusteringError, ConfigError, DivergedError, GradientError, JobError
from torchrec_cce.experiments.results import Entropies, TrialResult
from torchrec_cce.files.atomic import write_json
from torchrec_cce.files.lock import FolderLock
from torchrec_cce.methods.cce import CCEEmbeddingBagConfig
from torchrec_cce.methods.sketch import SketchEmbeddingBagConfig
from torchrec_cce.training import checkpoint
from torchrec_cce.training.config import RunConfig
from torchrec_cce.training.config_file import RUN_CONFIG
from torchrec_cce.training.loop import RunResult, train
from torchrec_cce.training.model import Sizes

ENDED = "ended.json"
"""In a run's folder: how it ended, and of which configuration it was."""
_BEGUN = "begun.json"
_PATIENCE_S = 60.0
"""A worker whose parent was killed is in its last step."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a worker needs to know of a run."""

    name: str
    """The name of the entry."""
    config: RunConfig
    run_dir: Path
    digest: str
    """Of all that decides the result: the configuration, and that of the run it starts from."""
    keeps_checkpoint: bool
    """Whether others start from it."""
    show_progress: bool = False

    def result(self, error: str | None = None) -> TrialResult:
        """What the trial came to, without what training measures: complete if it ended in an `error` before that."""
        return TrialResult(
            name=self.name,
            method=self.config.embedding.method,
            max_parameters=self.config.embedding.max_parameters,
            seed=self.config.seed,
            learning_rate=self.config.optimizer.embedding_learning_rate,
            run=self.run_dir.name,
            config=self.config.as_dict(),
            error=error,
        )


def run_trial(trial: Trial) -> TrialResult:
    """Run a trial, go on with one that was interrupted, or take what it came to before.

    What would come out the same again is kept: a result, or a model that has diverged. Other errors are not, and those
    that are not ours leave a traceback.

    Raises:
        KeyboardInterrupt: somebody asked to stop.
    """
    path = trial.run_dir.with_name(f".{trial.run_dir.name}.lock")
    with FolderLock(path, what=f"tries {trial.run_dir.name}", patience_s=_PATIENCE_S) as lock:
        _prepare(trial)
        try:
            result = _train(trial)
        except (ClusteringError, GradientError) as error:
            result = trial.result(one_line(error))
        except CCEError as error:
            return trial.result(one_line(error))
        except Exception as error:  # noqa: BLE001 - what is wrong with one method does not stop the others
            (trial.run_dir / "traceback.txt").write_text(traceback.format_exc())
            return trial.result(f"{type(error).__name__}: {one_line(error)}")
        lock.check()
        if not trial.keeps_checkpoint:
            drop_checkpoint(trial.run_dir)
        outcome = None if result.sizes is None else result.as_outcome(trial.run_dir)
        write_json(trial.run_dir / ENDED, {"digest": trial.digest, "outcome": outcome, "error": result.error})
        return result


def result_before(trial: Trial) -> TrialResult | None:
    """What the trial came to earlier, if a run of its digest ended in its folder."""
    values = _read(trial.run_dir / ENDED)
    if values.get("digest") != trial.digest:
        return None
    result = trial.result(values["error"])
    return result if values["outcome"] is None else _with_outcome(result, values["outcome"])


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def forget(run_dir: Path) -> None:
    """Let a run begin anew, also if this is killed half way."""
    (run_dir / ENDED).unlink(missing_ok=True)
    (run_dir / _BEGUN).unlink(missing_ok=True)


def drop_checkpoint(run_dir: Path) -> None:
    """Remove the checkpoints of a run; it then has none, also if this is killed half way."""
    gone = run_dir / ".checkpoints"
    shutil.rmtree(gone, ignore_errors=True)
    if (run_dir / "checkpoints").exists():
        os.replace(run_dir / "checkpoints", gone)
        shutil.rmtree(gone, ignore_errors=True)


def _prepare(trial: Trial) -> None:
    """Leave an empty folder, or that of a run of this configuration that was interrupted."""
    run_dir, config = trial.run_dir, trial.config.as_dict()
    interrupted = _read(run_dir / _BEGUN).get("digest") == trial.digest and not (run_dir / ENDED).exists()
    if not interrupted or _read(run_dir / RUN_CONFIG) not in ({}, config):
        forget(run_dir)
        shutil.rmtree(run_dir, ignore_errors=True)
    write_json(run_dir / _BEGUN, {"digest": trial.digest})


def _read(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: damaged ({error}); remove {path.parent}, and the trial is run again") from error
    return values


def _train(trial: Trial) -> TrialResult:
    config, run_dir = trial.config, trial.run_dir
    started = time.perf_counter()
    resumes = checkpoint.exists(run_dir)
    try:
        trained = train(config, run_dir, start="either", show_progress=trial.show_progress)
    except DivergedError as error:
        if not isinstance(error.result, RunResult):
            raise
        trained = error.result
    except JobError:
        raise  # what is there is another process's
    except CCEError:
        if not resumes:
            raise
        shutil.rmtree(run_dir)  # what was left cannot be gone on from
        trained = train(config, run_dir, show_progress=trial.show_progress)
    if trained.interrupted:
        raise KeyboardInterrupt
    return _measured(trial, trained, time.perf_counter() - started)


def _measured(trial: Trial, trained: RunResult, seconds: float) -> TrialResult:
    best = trained.best or {}
    tables = {table.name: table for table in trial.config.table_configs()}
    validation_bce = best.get("validation_bce", math.nan)
    diverged = not math.isfinite(validation_bce)
    return replace(
        trial.result(f"diverged: no finite BCE in {trained.steps} batches" if diverged else None),
        validation_bce=validation_bce,
        validation_auc=best.get("validation_auc", math.nan),
        test_bce=best.get("test_bce", math.nan),
        test_auc=best.get("test_auc", math.nan),
        sizes=trained.sizes,
        entropies={
            name: Entropies(
                learned=learned,
                random=random_entropies(table.num_embeddings, table.num_rows, len(learned)),
            )
            for name, learned in trained.entropies.items()
            if isinstance(table := tables[name], CCEEmbeddingBagConfig | SketchEmbeddingBagConfig)
        },
        steps=trained.steps,
        rows_per_second=trained.rows_per_second,
        seconds=seconds,
    )


def _with_outcome(result: TrialResult, outcome: Mapping[str, Any]) -> TrialResult:
    """`result` with what `TrialResult.as_outcome` wrote, now or in an earlier version of this package."""
    same = ("validation_bce", "steps", "rows_per_second", "seconds")
    return replace(
        result,
        **{name: outcome[name] for name in same},
        validation_auc=outcome.get("validation_auc", math.nan),
        test_bce=outcome["bce"],
        test_auc=outcome["auc"],
        sizes=Sizes(**outcome["sizes"]),
        entropies={
            table: Entropies(learned=tuple(each["learned"]), random=tuple(each["random"]))
            for table, each in outcome["entropies"].items()
        },
    )
