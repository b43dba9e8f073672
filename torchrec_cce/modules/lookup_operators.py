"""The packed lookup as custom operators of PyTorch: `pack`, raw IDs to words, and `pool`, words to embeddings.

An operator has only tensors and numbers, so whoever does the work has a number by which it is found.
"""

from collections.abc import Sequence
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch


class Worker(Protocol):
    """What the operators call; see `PackedLookup`."""

    def pack(self, ids: npt.NDArray[np.integer], offsets: npt.NDArray[np.int64], batch: int) -> torch.Tensor: ...

    def pool(
        self,
        words: torch.Tensor,
        offsets: torch.Tensor,
        weights: torch.Tensor | None,
        tables: Sequence[torch.Tensor],
        batch: int,
    ) -> torch.Tensor: ...

    def gradients(
        self,
        gradient: torch.Tensor,
        words: torch.Tensor,
        offsets: torch.Tensor,
        weights: torch.Tensor | None,
        rows: Sequence[int],
        widths: Sequence[int],
    ) -> list[torch.Tensor]: ...


_numbers = count()
_lookups: WeakValueDictionary[int, Worker] = WeakValueDictionary()


def numbered(lookup: Worker) -> int:
    """The number of a lookup, which holds as long as the lookup lives."""
    number = next(_numbers)
    _lookups[number] = lookup
    return number


# `torch.library.custom_op` would take longer than a small batch: for `pack` 20 µs, for the autograd function of `pool`,
# which has lists of tensors, half a millisecond.
_library = torch.library.Library("torchrec_cce", "FRAGMENT")
_library.define("pack(Tensor ids, Tensor offsets, SymInt batch, int lookup, int num_words) -> Tensor")
_library.define(
    "pool(Tensor words, Tensor offsets, Tensor? weights, Tensor[] tables, SymInt batch, int lookup, SymInt dim) "
    "-> Tensor"
)
_library.define(
    "pool_backward(Tensor gradient, Tensor words, Tensor offsets, Tensor? weights, SymInt[] rows, SymInt[] widths, "
    "int lookup) -> Tensor[]"
)


def pack(ids: torch.Tensor, offsets: torch.Tensor, batch: int, lookup: int, num_words: int) -> torch.Tensor:
    """The codes of raw `ids: [N]` in words, `[num_words, N]` int64.

    Args:
        offsets: [sources · batch + 1] int64, of their bags.
        lookup: the number of a `PackedLookup`.
    """
    words: torch.Tensor = torch.ops.torchrec_cce.pack(ids, offsets, batch, lookup, num_words)
    return words


@torch.library.impl(_library, "pack", "CPU")
def _(
    ids: torch.Tensor,
    offsets: torch.Tensor,
    batch: int,
    lookup: int,
    num_words: int,  # noqa: ARG001  for fake tensors
) -> torch.Tensor:
    return _lookups[lookup].pack(ids.contiguous().numpy(), offsets.numpy(), batch)


@torch.library.register_fake("torchrec_cce::pack", lib=_library)  # type: ignore[untyped-decorator]
def _(ids: torch.Tensor, offsets: torch.Tensor, batch: int, lookup: int, num_words: int) -> torch.Tensor:  # noqa: ARG001
    return ids.new_empty((num_words, ids.numel()), dtype=torch.int64)


def pool(
    words: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor | None,
    tables: list[torch.Tensor],
    batch: int,
    lookup: int,
    dim: int,
) -> torch.Tensor:
    """Pooled embeddings `[batch, dim]` of IDs in `words`, from `tables` of float32.

    Args:
        words, offsets, lookup: see `pack`.
        weights: [N] float32, or None where all are 1.
    """
    pooled: torch.Tensor = torch.ops.torchrec_cce.pool(words, offsets, weights, tables, batch, lookup, dim)
    return pooled


@torch.library.impl(_library, "pool", "CUDA")
@torch.library.impl(_library, "pool", "CPU")
def _(
    words: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor | None,
    tables: list[torch.Tensor],
    batch: int,
    lookup: int,
    dim: int,  # noqa: ARG001  for fake tensors
) -> torch.Tensor:
    return _lookups[lookup].pool(words, offsets, weights, tables, batch)


@torch.library.register_fake("torchrec_cce::pool", lib=_library)  # type: ignore[untyped-decorator]
def _(
    words: torch.Tensor,  # noqa: ARG001
    offsets: torch.Tensor,  # noqa: ARG001
    weights: torch.Tensor | None,  # noqa: ARG001
    tables: list[torch.Tensor],
    batch: int,
    lookup: int,  # noqa: ARG001
    dim: int,
) -> torch.Tensor:
    return tables[0].new_empty((batch, dim))


@torch.library.impl(_library, "pool_backward", "CUDA")
@torch.library.impl(_library, "pool_backward", "CPU")
def _(
    gradient: torch.Tensor,
    words: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor | None,
    rows: list[int],
    widths: list[int],
    lookup: int,
) -> list[torch.Tensor]:
    """Gradients of the tables of `pool`, of so many rows each; -1: none is wanted."""
    return _lookups[lookup].gradients(gradient, words, offsets, weights, rows, widths)


@torch.library.register_fake("torchrec_cce::pool_backward", lib=_library)  # type: ignore[untyped-decorator]
def _(
    gradient: torch.Tensor,
    words: torch.Tensor,  # noqa: ARG001
    offsets: torch.Tensor,  # noqa: ARG001
    weights: torch.Tensor | None,  # noqa: ARG001
    rows: list[int],
    widths: list[int],
    lookup: int,  # noqa: ARG001
) -> list[torch.Tensor]:
    return [
        gradient.new_empty((num_rows, width) if num_rows >= 0 else (0,))
        for num_rows, width in zip(rows, widths, strict=True)
    ]


class _Pool(torch.autograd.Function):
    """`pool`, whose backward pass gives gradients to tables alone."""

    @staticmethod
    def forward(
        ctx: Any,
        words: torch.Tensor,
        offsets: torch.Tensor,
        weights: torch.Tensor | None,
        batch: int,
        lookup: int,
        dim: int,
        *tables: torch.Tensor,
    ) -> torch.Tensor:
        # Not the tables: an optimizer may change them before the backward pass.
        ctx.save_for_backward(words, offsets, weights)
        ctx.shapes = [tuple(table.shape) for table in tables]
        ctx.lookup, ctx.owner = lookup, _lookups.get(lookup)  # which lives until then
        with torch._C._AutoDispatchBelowAutograd():
            return pool(words, offsets, weights, list(tables), batch, lookup, dim)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        wanted = ctx.needs_input_grad[6:]
        rows = [rows if needed else -1 for (rows, _), needed in zip(ctx.shapes, wanted, strict=True)]
        widths = [width for _, width in ctx.shapes]
        found = torch.ops.torchrec_cce.pool_backward(gradient, *ctx.saved_tensors, rows, widths, ctx.lookup)
        return (
            None,
            None,
            None,
            None,
            None,
            None,
            *(each if needed else None for each, needed in zip(found, wanted, strict=True)),
        )


@torch.library.impl(_library, "pool", "Autograd")
def _(
    words: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor | None,
    tables: list[torch.Tensor],
    batch: int,
    lookup: int,
    dim: int,
) -> torch.Tensor:
    pooled: torch.Tensor = _Pool.apply(words, offsets, weights, batch, lookup, dim, *tables)  # type: ignore[no-untyped-call]
    return pooled
