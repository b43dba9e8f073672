"""What a run measures: JSON lines to be read by programs, and TensorBoard files for people."""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from torchrec_cce.extras import require


class MetricsLog:
    """Appends records to `metrics.jsonl` and `tensorboard/` in a run folder.

    Args:
        run_dir: the folder; None on the ranks that do not write.
    """

    def __init__(self, run_dir: Path | None) -> None:
        self._file = None if run_dir is None else (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self._board: Any = None
        if run_dir is not None:
            require("tensorboard", "report")
            self._board = require("torch.utils.tensorboard", "report").SummaryWriter(str(run_dir / "tensorboard"))

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One record: `kind` is "train", "validation", "test" or "recluster"; numbers also go to TensorBoard."""
        if self._file is None:
            return
        record = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        prefix = "/".join([kind, *(v for v in values.values() if isinstance(v, str))])
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{prefix}/{name}", value, step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()
