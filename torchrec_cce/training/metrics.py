"""What a run measures, and how it is recorded for programs (JSON lines), in TensorBoard, and on a progress line."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.progress import Progress as Bar
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn
from torchmetrics.functional.classification import binary_auroc

from torchrec_cce.extras import require
from torchrec_cce.files.atomic import atomic_path, json_text
from torchrec_cce.training.schedule import Position


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How good the predicted click probabilities of a model are on one split."""

    bce: float
    """Mean binary cross entropy, nats a row."""
    auc: float
    """Area under the ROC curve; NaN where all labels are equal, or where a logit is NaN."""
    rows: int


def quality(logits: torch.Tensor, labels: torch.Tensor) -> Quality:
    """BCE and exact AUC of `logits: [N] float32` against `labels: [N] float32` of 0 and 1.

    Raises:
        ValueError: N is 0.
    """
    if len(labels) == 0:
        raise ValueError("no rows to evaluate")
    logits = logits.double()
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.double()).item()
    positives = int(labels.sum())
    undefined = positives in (0, len(labels)) or bool(logits.isnan().any())
    auc = float("nan") if undefined else binary_auroc(logits.sigmoid(), labels.int()).item()
    return Quality(bce=bce, auc=auc, rows=len(labels))


METRICS = "metrics.jsonl"


def has_measured(run_dir: Path) -> bool:
    """Whether a run has recorded anything."""
    path = run_dir / METRICS
    return path.exists() and path.stat().st_size > 0


class MetricsLog:
    """Appends records to `metrics.jsonl` and `tensorboard/` in a run folder.

    Args:
        run_dir: the folder; None on the ranks that do not write.
        after: where the run goes on. What a killed run wrote after this checkpoint is removed and measured again.
        check: called before each record; what it raises keeps it from being written.
    """

    def __init__(self, run_dir: Path | None, *, after: Position, check: Callable[[], object] = lambda: None) -> None:
        self._check = check
        self._file: TextIO | None = None
        self._board: Any = None
        if run_dir is None:
            return
        require("tensorboard", "report")
        self._board = require("torch.utils.tensorboard", "report").SummaryWriter(
            str(run_dir / "tensorboard"), purge_step=after.step + 1 if after.step else None
        )
        path = run_dir / METRICS
        # A new file: one who had it open, and was asleep when this run took its place, does not append to it.
        with atomic_path(path) as temporary:
            kept = path.read_bytes()[: after.metrics_bytes] if path.exists() else b""
            temporary.write_bytes(kept)
        self._file = path.open("a", encoding="utf-8")

    def flush(self) -> int:
        """Force all records to the disk. Returns the bytes of `metrics.jsonl`; 0 on the ranks that do not write."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Write a record, null for a number that is not finite. Numbers also go to TensorBoard.

        Args:
            kind: "train", "validation", "test", "recluster", "publish", or "swap" for a version that was adopted.
            step: batches trained.
        """
        if self._file is None:
            return
        self._check()
        record = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        self._file.write(json_text(record, strict=True) + "\n")
        self._file.flush()
        prefix = "/".join([kind, *(v for v in values.values() if isinstance(v, str))])
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{prefix}/{name}", value, step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()


class ProgressLine:
    """The line that a run shows while it trains.

    Args:
        title: the run's name.
        visible: False on the ranks that stay silent.
    """

    def __init__(self, title: str, *, visible: bool) -> None:
        self._bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.description}  {task.completed:,.0f} rows  {task.fields[status]}"),
            TimeElapsedColumn(),
            disable=not visible,
        )
        self._task = self._bar.add_task(title, total=None, status="")

    def advance(self, rows: int, *, epoch: int, loss: float, rows_per_second: float) -> None:
        """`rows` more were trained; `loss` is the mean BCE since the last record."""
        self._bar.update(
            self._task, advance=rows, status=f"epoch {epoch + 1}  loss {loss:.4f}  {rows_per_second:,.0f} rows/s"
        )

    def note(self, activity: str) -> None:
        """Say what is being done between two batches."""
        self._bar.update(self._task, status=activity)

    def __enter__(self) -> "ProgressLine":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
