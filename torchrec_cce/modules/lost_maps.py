"""A warning of state dicts whose maps are nowhere but in this process."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch.distributed as dist

from torchrec_cce.maps.kept import is_kept
from torchrec_cce.maps.pointer_map import PointerMap

_IS_CARED_FOR = ContextVar("_IS_CARED_FOR", default=False)


@contextmanager
def maps_cared_for() -> Iterator[None]:
    """State dicts that are made in this context are not kept, or their maps are kept beside them."""
    token = _IS_CARED_FOR.set(True)
    try:
        yield
    finally:
        _IS_CARED_FOR.reset(token)


def warn_if_lost(maps: Iterable[PointerMap]) -> bool:
    """Warn of learned maps that were neither published nor written. On several ranks, the first does.

    Returns:
        Whether there are any.
    """
    if _IS_CARED_FOR.get() or (dist.is_initialized() and dist.get_rank() > 0):
        return False
    lost = [each for each in maps if each.generation and each.version is None and not is_kept(each.digest)]
    if lost:
        warnings.warn(
            f"weights were taken by state_dict, but the map that they need ({lost[0].identity}) is in no file: maps "
            "are no part of a state_dict. Publish it (torchrec_cce.Registry.publish(collection.snapshot())), or keep "
            "both by torchrec_cce.save_model(model, folder)",
            stacklevel=3,
        )
    return bool(lost)
