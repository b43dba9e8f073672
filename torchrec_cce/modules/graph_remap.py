"""`GraphRemap`: the remap by operations of torch alone, for graphs that run where nothing of this package is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.fx import Proxy
from torch.utils._python_dispatch import _disable_current_modes
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_cce.errors import ConfigError
from torchrec_cce.methods.table import PointerScheme, TensorRows
from torchrec_cce.modules.remap import Remap
from torchrec_cce.modules.row_weights import pools_by_mean
from torchrec_cce.modules.surroundings import is_of_a_pipeline


def is_recorded(features: KeyedJaggedTensor) -> bool:
    """Whether what is done to `features` makes a graph, or is of no IDs at all: in `torch.export`, in a symbolic trace
    of `torch.fx`, and on the meta device.

    A training pipeline traces, too, but to find the modules, which it runs as they are.
    """
    if isinstance(features, Proxy):
        return not is_of_a_pipeline(features)
    return torch.compiler.is_exporting() or features.values().is_meta


class _Found(NamedTuple):
    scheme: PointerScheme
    rows_of: Callable[[torch.Tensor], TensorRows]


class GraphRemap:
    """The remap of a collection's features as they are now: maps that are attached later need another graph.

    Args:
        remap: of the collection.
    """

    def __init__(self, remap: Remap) -> None:
        self._remap = remap
        self._found: dict[str, _Found] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without what was made of maps."""
        return {"_remap": self._remap, "_found": {}}

    def __call__(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """What `Remap.forward` returns.

        An ID outside its table's universe ends the run of the graph, with a message that names feature and table.

        Raises:
            ConfigError: a phase of residents is open; a variable batch per feature.
            MapMismatchError: as `Remap.check_weights`.
        """
        remap = self._remap
        remap.check_weights()
        if remap.phase_is_open:
            raise ConfigError(
                "a phase of residents is open, whose rows no graph can look up; recluster first, which folds them"
            )
        if not isinstance(features, Proxy) and features.variable_stride_per_key():
            raise ConfigError("graphs are of batches of one size; this batch has another for each feature")
        bags_of = features.to_dict()
        rows, lengths, weights, sizes_of_keys = [], [], [], []
        for table, feature in remap.row_features:
            bags: JaggedTensor = bags_of[feature]
            ids, sizes = bags.values().to(torch.int64), bags.lengths()
            found = self._rows_of(table)(ids)
            if found.known is not None:
                universe = remap.universe(table)
                torch._assert_async(found.known.all(), f"feature {feature!r}: a raw ID is not {universe}")
            scheme = remap.schemes[table]
            rows.append(found.rows.flatten())
            lengths += [sizes * scheme.num_terms] * scheme.num_columns
            sizes_of_keys += [ids.shape[0] * scheme.num_terms] * scheme.num_columns
            if remap.makes_weights:
                weights.append(_weights(remap, table, found, bags))
        num_others = len(remap.row_keys) - len(lengths)  # of residents, of whom there are none
        lengths += [torch.zeros_like(lengths[0])] * num_others
        sizes_of_keys += [0] * num_others
        return KeyedJaggedTensor(
            keys=[str(key) for key in remap.row_keys],
            values=torch.cat(rows),
            lengths=torch.cat(lengths),
            weights=torch.cat(weights) if weights else None,
            stride=features.stride(),
            length_per_key=sizes_of_keys,
        )

    def _rows_of(self, table: str) -> Callable[[torch.Tensor], TensorRows]:
        scheme = self._remap.schemes[table]
        if table not in self._found or self._found[table].scheme is not scheme:
            with _disable_current_modes():  # an export would make stand-ins for tensors, of use to that export alone
                self._found[table] = _Found(scheme, scheme.on_tensors())
        return self._found[table].rows_of


def _weights(remap: Remap, table: str, found: TensorRows, bags: JaggedTensor) -> torch.Tensor:
    """Of the rows that are `found` of `bags`, flat."""
    signs = found.signs if found.signs is not None else torch.ones_like(found.rows, dtype=torch.float32)
    if remap.is_weighted:
        of_ids = bags.weights()
    elif pools_by_mean(remap.config(table)):
        of_ids = (1 / bags.lengths()).repeat_interleave(bags.lengths(), output_size=bags.values().shape[0])
    else:
        return signs.flatten()
    weights: torch.Tensor = (signs * of_ids[:, None]).flatten()
    return weights
