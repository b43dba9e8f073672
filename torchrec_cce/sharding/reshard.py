"""A distributed checkpoint read into a model, wherever its tables were placed when it was written."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from torchrec_cce.errors import ConfigError
from torchrec_cce.sharding.tables import scatter, size_of

_STATE = "optimizer.state"
_FUSED, _REPLICATED = "momentum1", "sum"
"""What FBGEMM's fused kernels and PyTorch's and TorchRec's Adagrads call one and the same accumulator."""


def load_checkpoint(folder: Path, model: DistributedModelParallel, optimizer: CombinedOptimizer) -> None:
    """Read what was saved as `{"model": model.state_dict(), "optimizer": optimizer.state_dict()}`.

    Every rank calls it. Neither the number of ranks nor the placement of a table need be those of the checkpoint.
    TorchRec carries a table over from rows to ranks and back. Where it is replicated, the state of Adagrad has another
    name and shape: from and to there it is converted here.

    Raises:
        ConfigError: the checkpoint lacks state that the optimizer needs: it is of another one.
    """
    for _, part in optimizer.optimizers:
        if isinstance(part, KeyedOptimizerWrapper):
            part.init_state()  # a state that was never stepped has no entries to load into
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    wanted: dict[str, dict[str, Any]] = state["optimizer"]["state"]
    there = {
        table: {name: value for name, value in entries.items() if f"{_STATE}.{table}.{name}" in saved}
        for table, entries in wanted.items()
    }
    renamed = {
        (table, name): f"{_STATE}.{table}.{_other_name(table, name)}"
        for table, entries in wanted.items()
        for name in entries.keys() - there[table].keys()
    }
    _check(renamed, saved.keys())

    # An empty dictionary is looked for under its own name, which a checkpoint of another placement does not have.
    loaded = {**state["optimizer"], "state": {table: entries for table, entries in there.items() if entries}}
    filled = {"optimizer": loaded} if any(loaded.values()) else {}
    load({"model": state["model"], **filled}, checkpoint_id=str(folder))
    everyones: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyones, [key for key in renamed.values() if key in saved])
    whole = {
        key: torch.empty(saved[key].size, dtype=saved[key].properties.dtype)  # type: ignore[union-attr]
        for key in sorted({key for keys in everyones for key in keys})
    }
    if whole:
        load(whole, checkpoint_id=str(folder))
    for (table, name), key in renamed.items():
        if key in whole:
            value = wanted[table][name]
            scatter(value, whole[key].reshape(size_of(value)))
    for table, entries in there.items():
        wanted[table].update(entries)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])


def _other_name(weight: str, name: str) -> str:
    """`sum` of `….t_user.weight` is `t_user.momentum1` in a fused kernel, and the other way round."""
    if name == _REPLICATED:
        return f"{weight.split('.')[-2]}.{_FUSED}"
    return _REPLICATED if name.endswith(f".{_FUSED}") else name


def _check(renamed: dict[tuple[str, str], str], saved: Any) -> None:
    """Adagrad's count of steps, which fused kernels lack, only serves a decay of the rate; it may start at zero."""
    converted = {table for (table, _), key in renamed.items() if key in saved}
    for (table, name), key in renamed.items():
        if key not in saved and not (name == "step" and table in converted):
            stem = f"{_STATE}.{table}."
            has = sorted(one.removeprefix(stem) for one in saved if one.startswith(stem)) or "nothing"
            raise ConfigError(
                f"the checkpoint has no {name!r} of the optimizer for {table!r}, but {has}; it was trained with "
                "another optimizer. Train on with that one"
            )
