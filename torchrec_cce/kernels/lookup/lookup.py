"""`Lookup`: the embeddings of bags of raw IDs, of several tables at once, on arrays in host memory."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from torchrec_cce.kernels.lookup.bags import pool_bags, sum_gradients
from torchrec_cce.kernels.lookup.layout import Layout
from torchrec_cce.kernels.lookup.pack import Packer
from torchrec_cce.kernels.lookup.threads import in_parallel

Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint64]
Offsets = npt.NDArray[np.int64]

_FEW = 4096
"""IDs that one thread is done with before another has begun."""
_TASKS_A_THREAD = 4
"""Tables differ in how many IDs they have."""


@dataclass(frozen=True, eq=False)
class Lookup:
    """Packs, pools and differentiates on any number of threads, with the same bits."""

    layout: Layout
    packer: Packer

    def pack(
        self, ids: npt.NDArray[np.integer], bounds: npt.NDArray[np.int64], words: Words, *, num_threads: int = 1
    ) -> tuple[int, int]:
        """Write the words of the features of `packer`; see there."""
        if num_threads == 1 or len(ids) < _FEW:
            return self.packer.pack(ids, bounds, words, 0, len(self.packer.features))
        outside: list[tuple[int, int]] = []

        def task(first: int, last: int) -> None:
            found = self.packer.pack(ids, bounds, words, first, last)
            if found[0] >= 0:
                outside.append(found)

        count = len(self.packer.features)
        size = -(-count // self._num_tasks(len(ids), num_threads))
        starts = range(0, count, max(1, size))
        in_parallel([partial(task, start, min(start + size, count)) for start in starts], num_threads)
        return min(outside, default=(-1, -1))

    def pool(
        self,
        tables: Words,
        words: Words,
        offsets: Offsets,
        weights: Floats | None,
        out: Floats,
        *,
        num_threads: int = 1,
    ) -> None:
        """Write pooled embeddings to `out: [B, Σ d]`; see `pool_bags`."""
        num_tasks = self._num_tasks(words.shape[1], num_threads)
        tasks: list[Callable[[], object]] = []
        for group in self.layout.groups:
            width, terms = (None,) * group.width, (None,) * group.num_terms
            parts = group.parts(num_tasks)
            # Few columns: each thread takes some of the bags.
            size = -(-len(out) // max(1, num_tasks // len(parts)))
            for first, last in parts:
                for bag in range(0, len(out), max(1, size)):
                    bags = bag, min(bag + size, len(out))
                    arguments = (self.layout.columns, tables, words, offsets, weights, out, first, last, *bags)
                    tasks.append(partial(pool_bags, *arguments, width, terms))
        in_parallel(tasks, num_threads)

    def sum_gradients(
        self,
        tables: Words,
        words: Words,
        offsets: Offsets,
        weights: Floats | None,
        gradients: Floats,
        *,
        num_threads: int = 1,
    ) -> None:
        """Write the gradients of tables; see the loop of this name."""
        num_tasks = self._num_tasks(words.shape[1], num_threads)
        tasks = []
        for group in self.layout.groups:
            width, terms = (None,) * group.width, (None,) * group.num_terms
            for lines in group.parts(num_tasks):
                arguments = (self.layout.columns, tables, words, offsets, weights, gradients, *lines)
                tasks.append(partial(sum_gradients, *arguments, width, terms))
        in_parallel(tasks, num_threads)

    @staticmethod
    def _num_tasks(num_ids: int, num_threads: int) -> int:
        return 1 if num_threads == 1 or num_ids < _FEW else _TASKS_A_THREAD * num_threads
