"""`Inputs`: what goes into the stock modules of a collection, which depends on whether a graph is made of it."""

from collections.abc import Set

import torch
from torch import nn
from torch.fx import Proxy
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_cce.modules.bags import splittable
from torchrec_cce.modules.graph_remap import GraphRemap, is_recorded
from torchrec_cce.modules.remap import Remap


class Inputs:
    """Of a collection.

    Args:
        own: its remap. Where a training pipeline has put something else in its place, that is `remap` below.
    """

    def __init__(self, own: Remap) -> None:
        self._own = own
        self._in_graphs = GraphRemap(own)

    def are_stock(self, features: KeyedJaggedTensor, remap: nn.Module) -> bool:
        """Whether they are `features` themselves: a graph is made, and there is nothing to remap."""
        is_graph = is_recorded(features) or torch.compiler.is_compiling() or torch.jit.is_tracing()
        return is_graph and not self._own.changes_keys and remap is self._own

    def rows(
        self,
        features: KeyedJaggedTensor,
        remap: nn.Module,
        dtype: torch.dtype | None = None,
        *,
        is_sharded: bool,
        tables: Set[str] | None = None,
    ) -> KeyedJaggedTensor:
        """`features`, remapped.

        Args:
            tables: whose rows are wanted, as of `Remap.part`; None = of all.
            dtype: of the weights, if there are any, that stock modules take; None = as they are.
            is_sharded: whether those were replaced, by some that need no help.
        """
        if is_recorded(features) and remap is self._own and not self._are_rows(features):
            return self._in_graphs(features)
        rows: KeyedJaggedTensor = remap(features) if tables is None else self._own.part(features, tables)
        return rows if is_sharded else splittable(rows, dtype)

    def _are_rows(self, features: KeyedJaggedTensor) -> bool:
        """Whether `features` were remapped before, which a symbolic trace cannot ask."""
        return not isinstance(features, Proxy) and bool(features.keys() == self._own.row_keys)
