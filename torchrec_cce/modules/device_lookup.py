"""`DeviceLookup`: what words say, pooled and differentiated on a GPU by Triton's kernels."""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from torchrec_cce.kernels.lookup.layout import Layout
from torchrec_cce.kernels.lookup_on_gpu.tiles import Tiles, next_power_of_2

_BAGS = 32
"""Of a program that adds gradients: among so many it looks for rows in common."""
_FEWEST = 16
"""Triton multiplies no matrices with a shorter side."""


def takes_words(device: torch.device) -> bool:
    """Whether tables on a device are looked up from words: on a CPU by our loops, on a GPU by Triton, where that is."""
    return device.type == "cpu" or by_triton(device)


def by_triton(device: torch.device) -> bool:
    """Whether that is done by Triton."""
    return device.type == "cuda" and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


class DeviceLookup:
    """The lookup of a layout on one device. Addresses, words, offsets, weights and results are there."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        # Not at the top of the file: it needs Triton.
        from torchrec_cce.kernels.lookup_on_gpu import bags

        self._pool, self._add = bags.pool_bags, bags.add_gradients
        self._device, self._dim = device, layout.dim
        self._columns = torch.from_numpy(layout.columns.view(np.int64)).to(device)
        self._tiles = [(tiles, torch.from_numpy(tiles.lines).to(device)) for tiles in Tiles.of(layout)]

    def pool(
        self,
        tables: npt.NDArray[np.uint64],
        words: torch.Tensor,
        offsets: torch.Tensor,
        weights: torch.Tensor | None,
        batch: int,
    ) -> torch.Tensor:
        """[B, Σ d] float32.

        Args:
            tables: the address of each.
        """
        out = torch.empty((batch, self._dim), device=self._device)
        common = (self._addresses(tables), words, offsets, weights, out, batch, words.shape[1], self._dim)
        for tiles, lines in self._tiles:
            blocks = -(-batch // tiles.num_bags)
            sizes = {"LANES": tiles.lanes, "BAGS": tiles.num_bags}
            self._launch(self._pool, len(lines) * blocks, tiles, (self._columns, lines, *common), sizes)
        return out

    def add_gradients(
        self,
        tables: npt.NDArray[np.uint64],
        words: torch.Tensor,
        offsets: torch.Tensor,
        weights: torch.Tensor | None,
        gradients: torch.Tensor,
    ) -> None:
        """Add to the gradients of tables what `gradients: [B, Σ d]` gives.

        Args:
            tables: the address of each, 0 where none is wanted.
        """
        batch = len(gradients)
        common = (self._addresses(tables), words, offsets, weights, gradients, batch, words.shape[1], self._dim)
        for tiles, _ in self._tiles:
            group = tiles.group
            num_programs = (group.last - group.first) * -(-batch // _BAGS)
            sizes = {"LANES": max(_FEWEST, next_power_of_2(group.width)), "BAGS": _BAGS}
            self._launch(self._add, num_programs, tiles, (self._columns, *common, group.first), sizes)

    def _addresses(self, tables: npt.NDArray[np.uint64]) -> torch.Tensor:
        return sent(torch.from_numpy(tables.view(np.int64)), self._device)

    def _launch(
        self, kernel: Any, num_programs: int, tiles: Tiles, arguments: Sequence[Any], sizes: dict[str, int]
    ) -> None:
        if num_programs == 0:
            return
        # Triton starts a kernel on the device that is current.
        with torch.cuda.device_of(self._columns):
            kernel[(num_programs,)](*arguments, WIDTH=tiles.group.width, TERMS=tiles.group.num_terms, **sizes)


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`; from host memory without waiting for what the device does."""
    if tensor.is_cpu and device.type == "cuda" and not torch.compiler.is_compiling():
        tensor = tensor.pin_memory()  # itself, if it is already
    return tensor.to(device, non_blocking=True)
