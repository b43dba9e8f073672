"""`PackedLookup`: pooled embeddings of raw IDs in one step, where tables are plain parameters on the CPU or a GPU.

Raw IDs are packed to codes and pooled from the weights of the stock `EmbeddingBagCollection`, which is not called: no
list of rows and no sort, in one pass over all tables.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_cce.errors import ConfigError
from torchrec_cce.kernels.lookup.layout import FeatureTable, Layout
from torchrec_cce.methods.compositional import SignedScheme
from torchrec_cce.modules.device_lookup import takes_words
from torchrec_cce.modules.feature_words import codes_of, rows_and_width, shapes_of, stored_form
from torchrec_cce.modules.remap import Remap
from torchrec_cce.modules.row_keys import WordKey
from torchrec_cce.modules.word_lookup import Place, WordLookup


class PackedLookup(WordLookup):
    """Of some tables of a collection, none of them signed or computed, for inputs with certain keys.

    Args:
        remap: of the collection.
        names: of the tables.
        keys: of the features of the input: raw IDs, or the words of all its tables.
        device: where the tables are.
        places: of each table; None: each is a tensor by itself, in the order of `shapes`.
    """

    def __init__(
        self,
        remap: Remap,
        names: Sequence[str],
        keys: Sequence[str],
        device: torch.device,
        places: Mapping[str, Place] | None = None,
    ) -> None:
        self._remap, self._keys, self._places = remap, keys, places
        self._num_changes = remap.num_changes
        self.shapes = {table: rows_and_width(remap.config(table)) for table in names}
        features = [(table, feature) for table in names for feature in remap.config(table).feature_names]
        self._word_form = remap.word_form_of(keys)
        self._packed: list[tuple[str, str]] = []
        self._resolved: list[tuple[tuple[str, str], FeatureTable, int]] = []
        """What the remap finds, with the first word of each."""
        codes = []
        if self._word_form is None:
            shapes = shapes_of([(remap.config(table), remap.schemes[table]) for table in names], keys, stored_form)
            layout = Layout.of(shapes)
            for (table, feature), shape, word in zip(features, shapes, layout.first_words, strict=True):
                found = codes_of(remap.schemes[table], shape, word)
                if found is None:
                    self._resolved.append(((table, feature), shape, word))
                else:
                    self._packed.append((table, feature))
                    codes.append(found)
        else:
            assert features == self._word_form.table_features
            layout = self._word_form.layout
        super().__init__(
            layout,
            codes,
            num_sources=len(keys if self._word_form is None else self._word_form.features),
            places=[(number, 0) if places is None else places[table] for number, table in enumerate(names)],
            device=device,
        )

    def is_of(self, keys: Sequence[str], device: torch.device, places: Mapping[str, Place] | None) -> bool:
        """Whether this still is the lookup of inputs with such keys: tables were not moved, no other map attached."""
        return (
            keys == self._keys
            and device == self.device
            and places is self._places
            and self._remap.num_changes == self._num_changes
            and (self._word_form is None or isinstance(keys[0], WordKey))  # equal to a plain key
        )

    def words(self, ids: torch.Tensor, offsets: torch.Tensor, batch: int) -> torch.Tensor:
        if self._word_form is None:
            return super().words(ids, offsets, batch)
        self._remap.check_weights()
        return self._word_form.words(ids, offsets, batch)

    def pack(self, ids: npt.NDArray[np.integer], offsets: npt.NDArray[np.int64], batch: int) -> torch.Tensor:
        self._remap.check_weights()
        words = super().pack(ids, offsets, batch)
        bounds, flat = self.bounds(offsets, batch), words.numpy().view(np.uint64)
        for (table, feature), shape, first in self._resolved:
            mine = slice(bounds[shape.source], bounds[shape.source + 1])
            found = self._remap.look_up_words(table, feature, _of(ids, bounds, shape.source), shape)
            for word, each in enumerate(found, start=first):
                flat[word, mine] = each
        return words

    def refuse(self, number: int, ids: npt.NDArray[np.integer], bounds: npt.NDArray[np.int64]) -> None:
        table, feature = self._packed[number]
        self._remap.look_up(table, feature, _of(ids, bounds, self._keys.index(feature)))  # names the ID


def _of(ids: npt.NDArray[np.integer], bounds: npt.NDArray[np.int64], source: int) -> npt.NDArray[np.int64]:
    return ids[bounds[source] : bounds[source + 1]].astype(np.int64, copy=False)


class Replicas(ABC):
    """A sharded stock collection that has tables whole on this rank, in tensors that may hold several each."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the tables are."""

    @abstractmethod
    def places(self) -> Mapping[str, Place] | None:
        """Of each table, the same object until they change; None unless all are here and nothing looks on.

        Where gradients are noted, tables that have a fused optimizer are not here.
        """

    @abstractmethod
    def look_up(self, features: KeyedJaggedTensor, lookup: WordLookup, *, weighted: bool) -> torch.Tensor:
        """[B, Σ d], what `lookup` finds in the tensors that `places` speaks of; gradients are averaged over ranks."""


class PackedLookups:
    """The packed lookups of one stock collection; a copy of it makes its own.

    Args:
        tables: their names, in its order.
    """

    def __init__(self, tables: Sequence[str]) -> None:
        self.tables = tables
        self._last: PackedLookup | None = None
        self.in_graphs: dict[tuple[str, ...], PackedLookup] = {}
        """Those that graphs of `torch.compile` have, by the keys of their inputs."""

    def __getstate__(self) -> dict[str, Any]:
        return {"tables": self.tables, "_last": None, "in_graphs": {}}

    def pooled(
        self, remap: Remap, stock: nn.Module | None, features: KeyedJaggedTensor, *, weighted: bool
    ) -> torch.Tensor | None:
        """[B, Σ d], or None where the stock collection has to look them up.

        Args:
            stock: the collection of all tables.
        """
        if not isinstance(stock, EmbeddingBagCollection | Replicas) or not _takes(features, weighted=weighted):
            return None
        reached = _reached(stock)
        if reached is None or not _can_come_to(reached[0], features):
            return None
        device, places = reached
        keys = features.keys()
        are_words = remap.word_form_of(keys) is not None
        if are_words and (device.type != "cpu" or torch.compiler.is_compiling()):
            return None
        if torch.compiler.is_compiling() and places is None:
            is_made = _make_for_graph(self, remap, tuple(keys), device, remap.num_changes)
            lookup = self.in_graphs[tuple(keys)] if is_made else None
        else:
            lookup = self._of(remap, keys, device, places)
        if lookup is None:
            return None
        if isinstance(stock, Replicas):
            return stock.look_up(features, lookup, weighted=weighted)
        weights = _plain_weights(stock, lookup)
        return None if weights is None else lookup(features, weights, weighted=weighted)

    def takes_words(self, remap: Remap, stock: nn.Module | None) -> bool:
        """Whether `pooled` now takes words of remapped data, which elsewhere become rows."""
        reached = _reached(stock) if isinstance(stock, EmbeddingBagCollection | Replicas) else None
        return reached is not None and reached[0].type == "cpu" and remap.word_form is not None

    def of_request(
        self, remap: Remap, stock: nn.Module | None, keys: Sequence[str], ids: torch.Tensor, offsets: torch.Tensor
    ) -> torch.Tensor | None:
        """[B, Σ d] without gradients, or None where `pooled` would not have looked them up from plain parameters."""
        if not isinstance(stock, EmbeddingBagCollection) or _has_hooks(stock):
            return None
        lookup = self._of(remap, keys, ids.device)
        weights = None if lookup is None else _plain_weights(stock, lookup)
        if lookup is None or weights is None:
            return None
        return lookup.look_up(ids, offsets, weights, _batch(keys, offsets))

    def _of(
        self, remap: Remap, keys: Sequence[str], device: torch.device, places: Mapping[str, Place] | None = None
    ) -> PackedLookup | None:
        if self._last is None or not self._last.is_of(keys, device, places):
            self._last = self.made(remap, keys, device, places)
        return self._last

    def made(
        self, remap: Remap, keys: Sequence[str], device: torch.device, places: Mapping[str, Place] | None = None
    ) -> PackedLookup | None:
        """A packed lookup for such keys; None if there is none."""
        given = set(keys)
        is_raw = {feature for _, feature in remap.table_features} <= given and len(given) == len(keys)
        is_complete = is_raw or remap.word_form_of(keys) is not None
        can_be = is_complete and can_be_packed(remap, self.tables)
        return PackedLookup(remap, self.tables, keys, device, places) if can_be else None


def _batch(keys: Sequence[str], offsets: torch.Tensor) -> int:
    batch, rest = divmod(offsets.numel() - 1, len(keys))
    if rest or batch < 0:
        raise ConfigError(
            f"{offsets.numel()} offsets are not those of bags of {len(keys)} features, which are one more than a "
            f"multiple of {len(keys)}"
        )
    return batch


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _make_for_graph(
    lookups: PackedLookups,
    remap: Remap,
    keys: tuple[str, ...],
    device: torch.device,
    num_changes: int,  # noqa: ARG001  of maps, after each of which another graph is made
) -> bool:
    """Make the lookup of a graph of `torch.compile`, which does not look in here. Returns whether there is one."""
    made = lookups.made(remap, list(keys), device)
    if made is not None:
        lookups.in_graphs[keys] = made
    return made is not None


def _reached(stock: EmbeddingBagCollection | Replicas) -> tuple[torch.device, Mapping[str, Place] | None] | None:
    """Where the tables of a stock collection are, and their places in it; None where it must be called."""
    if _has_hooks(stock):
        return None
    device = stock.device if isinstance(stock, Replicas) else _device_of(stock)
    if not takes_words(device):
        return None
    places = stock.places() if isinstance(stock, Replicas) else None
    return None if isinstance(stock, Replicas) and places is None else (device, places)


def _takes(features: KeyedJaggedTensor, *, weighted: bool) -> bool:
    if type(features) is not KeyedJaggedTensor or features.variable_stride_per_key():
        return False
    ids = features.values()
    if ids.dtype not in (torch.int64, torch.int32):
        return False
    weights = features.weights_or_none() if weighted else None
    if weights is None:
        return not weighted
    return weights.dtype == torch.float32 and not weights.requires_grad


def _can_come_to(device: torch.device, features: KeyedJaggedTensor) -> bool:
    """Whether tables on `device` may be looked up: IDs are packed on the host, for a GPU wherever they are."""
    ids = features.values()
    return ids.is_cpu or bool(ids.device == device)


def can_be_packed(remap: Remap, tables: Iterable[str]) -> bool:
    """Whether raw IDs of these tables can be looked up from words."""
    return not any(isinstance(remap.schemes[table], SignedScheme) for table in tables)


def _device_of(stock: EmbeddingBagCollection) -> torch.device:
    """Of its first table; the collection itself names the device that it was made on."""
    first = next(iter(stock.embedding_bags._modules.values()), None)
    weight = None if first is None else first._parameters.get("weight")
    device: torch.device = stock.device if weight is None else weight.device
    return device


def _plain_weights(stock: EmbeddingBagCollection, lookup: PackedLookup) -> list[torch.Tensor] | None:
    """The weights of tables, if nothing but these would be used of the stock collection: no wrapper, and no hook.

    They must have the shapes that the compiled loops take for granted.
    """
    if type(stock) is not EmbeddingBagCollection:
        return None
    weights: list[torch.Tensor] = []
    on_cpu = lookup.device.type == "cpu"  # which is asked faster
    bags = stock.embedding_bags._modules  # without the checks of a ModuleDict, which take longer than a small batch
    for table, shape in lookup.shapes.items():
        bag = bags[table]
        if type(bag) is not nn.EmbeddingBag or _has_hooks(bag):
            return None
        weight = bag._parameters.get("weight")
        if type(weight) is not nn.Parameter or weight.dtype != torch.float32:
            return None
        if not (weight.is_cpu if on_cpu else weight.device == lookup.device):
            return None
        if weight.shape != shape or not weight.is_contiguous():
            return None
        weights.append(weight)
    return weights


def _has_hooks(module: Any) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
