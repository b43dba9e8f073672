"""Where tasks run: in processes of this machine, on a Ray cluster, or in the calling process itself."""

from typing import Literal, get_args

from torchrec_cce.errors import ConfigError
from torchrec_cce.workers.engine import Engine
from torchrec_cce.workers.inline import InlineEngine
from torchrec_cce.workers.local import LocalEngine
from torchrec_cce.workers.ray import RayEngine

EngineName = Literal["local", "ray"]
"""What a user may choose."""


def engine_of(name: EngineName, *, num_workers: int | None = None, num_tasks: int | None = None) -> Engine:
    """The engine called `name`, not yet entered.

    Args:
        name: `"local"`, processes of this machine; `"ray"`, the cluster that `RAY_ADDRESS` names, or else a Ray of this
            process's own.
        num_workers: None = one a core, of the machine or of the cluster.
        num_tasks: if this is all there will ever be, and at most 1, `"local"` runs it in the calling process, where
            no worker needs about a second to start.

    Raises:
        ConfigError: an unknown name, or `num_workers < 1`.
        MissingExtraError: Ray is not installed.
    """
    if name not in get_args(EngineName):
        raise ConfigError(f"engine={name!r} is not one of {', '.join(get_args(EngineName))}")
    if num_workers is not None and num_workers < 1:
        raise ConfigError(f"num_workers={num_workers} is not at least 1")
    if name == "ray":
        return RayEngine(num_workers)
    return InlineEngine(num_workers) if num_tasks is not None and num_tasks <= 1 else LocalEngine(num_workers)
