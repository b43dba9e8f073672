"""One run of a comparison, in a folder of its own that says how it ended."""

import json
import math
import os
import shutil
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from torchrec_cce.clustering.entropy import random_entropies
from torchrec_cce.errors import CCEError, ClusteringError
from torchrec_cce.experiments.outcome import Entropies, Outcome
from torchrec_cce.files.atomic import write_json
from torchrec_cce.methods.cce import CCEEmbeddingBagConfig
from torchrec_cce.methods.sketch import SketchEmbeddingBagConfig
from torchrec_cce.training import checkpoint
from torchrec_cce.training.config import RunConfig
from torchrec_cce.training.config_file import RUN_CONFIG
from torchrec_cce.training.loop import RunResult, train
from torchrec_cce.training.sizes import Sizes

ENDED = "ended.json"
"""In a run's folder: how it ended, and of which configuration it was."""
_BEGUN = "begun.json"
_PATIENCE_S = 60.0
"""A worker whose parent was killed is in its last step."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a worker needs to know of a run."""

    name: str
    """Of the entry."""
    config: RunConfig
    run_dir: Path
    digest: str
    """Of all that decides the outcome: the configuration, and that of the run it starts from."""
    keeps_checkpoint: bool
    """Whether others start from it."""
    show_progress: bool = False


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run ended: with an outcome, with an error, or, if it diverged, with both."""

    outcome: Outcome | None = None
    error: str | None = None


def run_trial(trial: Trial) -> Ended:
    """Run a trial, go on with one that was interrupted, or take what it came to before.

    What would come out the same again is kept: an outcome, or embeddings that cannot be clustered. Other errors are
    not, and those that are not ours leave a traceback.

    Raises:
        KeyboardInterrupt: somebody asked to stop.
    """
    trial.run_dir.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(trial.run_dir.with_name(f".{trial.run_dir.name}.lock"), timeout=_PATIENCE_S):
        _prepare(trial)
        try:
            ended = _train(trial)
        except ClusteringError as error:
            ended = Ended(error=one_line(error))
        except CCEError as error:
            return Ended(error=one_line(error))
        except Exception as error:  # noqa: BLE001 - what is wrong with one method does not stop the others
            (trial.run_dir / "traceback.txt").write_text(traceback.format_exc())
            return Ended(error=f"{type(error).__name__}: {one_line(error)}")
        if not trial.keeps_checkpoint:
            drop_checkpoint(trial.run_dir)
        write_json(trial.run_dir / ENDED, {"digest": trial.digest, **asdict(ended)})
        return ended


def ended_before(run_dir: Path, digest: str) -> Ended | None:
    """How the run in a folder ended, if it is one of this digest that did."""
    values = _read(run_dir / ENDED)
    if values.get("digest") != digest:
        return None
    outcome = values["outcome"]
    return Ended(outcome=None if outcome is None else _outcome_of(outcome, run_dir), error=values["error"])


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
    """An empty folder, or that of a run of this configuration that was interrupted."""
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
    return values


def _train(trial: Trial) -> Ended:
    config, run_dir = trial.config, trial.run_dir
    started = time.perf_counter()
    resumes = checkpoint.exists(run_dir)
    try:
        result = train(config, run_dir, start="either", show_progress=trial.show_progress)
    except CCEError:
        if not resumes:
            raise
        shutil.rmtree(run_dir)  # what was left cannot be gone on from
        result = train(config, run_dir, show_progress=trial.show_progress)
    if result.interrupted:
        raise KeyboardInterrupt
    outcome = _outcome(trial, result, time.perf_counter() - started)
    diverged = not math.isfinite(outcome.validation_bce)
    return Ended(outcome=outcome, error=f"diverged: no finite BCE in {result.steps} batches" if diverged else None)


def _outcome(trial: Trial, result: RunResult, seconds: float) -> Outcome:
    config, best = trial.config, result.best or {}
    tables = {table.name: table for table in config.table_configs()}
    return Outcome(
        method=config.embedding.method,
        name=trial.name,
        max_parameters=config.embedding.max_parameters,
        seed=config.seed,
        learning_rate=config.optimizer.embedding_learning_rate,
        validation_bce=best.get("validation_bce", math.nan),
        validation_auc=best.get("validation_auc", math.nan),
        bce=best.get("test_bce", math.nan),
        auc=best.get("test_auc", math.nan),
        sizes=result.sizes,
        entropies={
            name: Entropies(
                learned=learned,
                random=random_entropies(table.num_embeddings, table.num_rows, len(learned)),
            )
            for name, learned in result.entropies.items()
            if isinstance(table := tables[name], CCEEmbeddingBagConfig | SketchEmbeddingBagConfig)
        },
        steps=result.steps,
        rows_per_second=result.rows_per_second,
        seconds=seconds,
        run_dir=str(trial.run_dir),
    )


def _outcome_of(values: Mapping[str, Any], run_dir: Path) -> Outcome:
    entropies = {
        table: Entropies(learned=tuple(each["learned"]), random=tuple(each["random"]))
        for table, each in values["entropies"].items()
    }
    read = {"sizes": Sizes(**values["sizes"]), "entropies": entropies, "run_dir": str(run_dir)}
    return Outcome(**{**values, **read})
