"""`torchrec.ir`, which is not in TorchRec's wheel: as it is where it is there, else as little of it as ours needs."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

IS_THERE = find_spec("torchrec.ir") is not None


class _JsonSerializer:
    module_to_serializer_cls: ClassVar[dict[str, Any]] = {}


def _qualname(thing: nn.Module | type[nn.Module]) -> str:
    kind = thing if isinstance(thing, type) else type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"


def _get_deserialized_device(kept: str | None, device: torch.device | None) -> torch.device | None:
    return torch.device(kept) if kept and device is None else device


def _ir_emb_lookup(tensors: list[torch.Tensor | None], batch_size: int, dims: list[int]) -> list[torch.Tensor]:
    return [
        torch.empty(batch_size, dim, device=next(each.device for each in tensors if each is not None)) for dim in dims
    ]


@contextmanager
def torchrec_ir() -> Iterator[None]:
    """Inside, `torchrec.ir.serializer` and `torchrec.ir.utils` can be imported."""
    if IS_THERE:
        yield
        return
    torch.library.custom_op("torchrec::ir_emb_lookup", _ir_emb_lookup, mutates_args=())
    package, serializer, utils = (ModuleType(f"torchrec.ir{name}") for name in ("", ".serializer", ".utils"))
    package.__path__ = []
    serializer.JsonSerializer = _JsonSerializer  # type: ignore[attr-defined]
    serializer.get_deserialized_device = _get_deserialized_device  # type: ignore[attr-defined]
    utils.qualname = _qualname  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        for module in (package, serializer, utils):
            patch.setitem(sys.modules, module.__name__, module)
        yield
