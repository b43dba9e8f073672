"""`Surroundings`: what TorchRec does with the stock modules of a collection, and a warning where that is not as it
should be."""

import warnings
from collections.abc import Iterator

import torch
from torch import nn
from torch.fx import Proxy

_PIPELINES = "torchrec.distributed.train_pipeline"
_BY_COLUMNS = ("column_wise", "table_column_wise", "grid_shard")


def is_of_a_pipeline(features: Proxy) -> bool:
    """Whether it is a training pipeline of TorchRec's that traces."""
    return type(features.tracer).__module__.startswith(_PIPELINES)


class Surroundings:
    """Looks at a collection whenever it is called: when its stock modules were replaced, and after a pipeline has
    traced it."""

    def __init__(self) -> None:
        self._seen: tuple[int, ...] = ()
        self._was_traced = False

    def look(self, collection: nn.Module, features: object, *, is_ahead: bool) -> None:
        """Warn of tables that are split by columns, and of a pipeline that does not run the remap ahead of the model.

        Args:
            features: the input of a forward, or what stands for it in the trace of a pipeline.
            is_ahead: whether the remap has been run already.
        """
        if torch.compiler.is_compiling():
            return
        if isinstance(features, Proxy):
            self._was_traced = is_of_a_pipeline(features)
            return
        if self._was_traced:
            self._was_traced = False
            if not is_ahead:
                warnings.warn(
                    "a training pipeline does not run the remap ahead of the model, so that none of this collection's "
                    "tables is pipelined. Pass pipeline_postproc=True to the pipeline, and "
                    "torchrec_cce.sharding.drain it before a clustering",
                    stacklevel=2,
                )
        stock = tuple(map(id, _stock_modules(collection)))
        if stock != self._seen:
            self._seen = stock
            _warn_of_columns(collection)


def _stock_modules(collection: nn.Module) -> Iterator[nn.Module | None]:
    for module in collection._modules.values():
        if isinstance(module, nn.ModuleDict):
            yield from module._modules.values()
        else:
            yield module


def _warn_of_columns(collection: nn.Module) -> None:
    plans = [getattr(module, "module_sharding_plan", {}) for module in collection.modules()]
    found = {name: how.sharding_type for plan in plans for name, how in plan.items()}
    split = {name: how for name, how in found.items() if how in _BY_COLUMNS}
    if split:
        warnings.warn(
            f"tables are split by columns: {split}. Rowwise optimizers then keep a state for each part of a row, and "
            "the model is not the one that a single rank would train. Plan with "
            "torchrec_cce.sharding.CCEShardingPlanner and shard with get_cce_sharders(), which never do so",
            stacklevel=3,
        )
