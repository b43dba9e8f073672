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
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_cce.errors import ConfigError
from torchrec_cce.kernels.lookup.layout import FeatureTable, Layout
from torchrec_cce.kernels.lookup.pack import Codes
from torchrec_cce.maps.pointer_format import PointerFormat
from torchrec_cce.maps.pointer_map import PointerMap
from torchrec_cce.methods.cce import CCEConfig
from torchrec_cce.methods.compositional import CompositionalConfig, HashedScheme, SignedScheme
from torchrec_cce.methods.table import FullScheme
from torchrec_cce.modules.device_lookup import takes_words
from torchrec_cce.modules.remap import Remap
from torchrec_cce.modules.row_weights import pools_by_mean
from torchrec_cce.modules.word_lookup import Place, WordLookup


class PackedLookup(WordLookup):
    """Of some tables of a collection, none of them signed or computed, for inputs with certain keys.

    Args:
        remap: of the collection.
        names: of the tables.
        keys: of the features of the input.
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
        self.shapes = {table: _rows_and_width(remap.config(table)) for table in names}
        features = [(table, feature) for table in names for feature in remap.config(table).feature_names]
        shapes = [_shape(remap, table, names.index(table), keys.index(feature)) for table, feature in features]
        layout = Layout.of(shapes)
        codes = [
            _codes(remap, table, shape, word)
            for (table, _), shape, word in zip(features, shapes, layout.first_words, strict=True)
        ]
        super().__init__(
            layout,
            [each for each in codes if each is not None],
            num_sources=len(keys),
            places=[(number, 0) if places is None else places[table] for number, table in enumerate(names)],
            device=device,
        )
        self._packed = [feature for feature, each in zip(features, codes, strict=True) if each is not None]
        self._by_rows = [
            (feature, shape, word)
            for feature, shape, word, each in zip(features, shapes, layout.first_words, codes, strict=True)
            if each is None
        ]

    def is_of(self, keys: Sequence[str], device: torch.device, places: Mapping[str, Place] | None) -> bool:
        """Whether this still is the lookup of inputs with such keys: tables were not moved, no other map attached."""
        return (
            keys == self._keys
            and device == self.device
            and places is self._places
            and self._remap.num_changes == self._num_changes
        )

    def pack(self, ids: npt.NDArray[np.integer], offsets: npt.NDArray[np.int64], batch: int) -> torch.Tensor:
        self._remap.check_weights()
        words = super().pack(ids, offsets, batch)
        if not self._by_rows:
            return words
        bounds, flat = self.bounds(offsets, batch), words.numpy().view(np.uint64)
        for (table, feature), shape, word in self._by_rows:
            rows = self._remap.look_up(table, feature, _of(ids, bounds, shape.source))
            mine = slice(bounds[shape.source], bounds[shape.source + 1])
            flat[word : word + shape.num_words, mine] = rows.transpose(2, 0, 1).reshape(shape.num_words, -1)
        return words

    def refuse(self, number: int, ids: npt.NDArray[np.integer], bounds: npt.NDArray[np.int64]) -> None:
        table, feature = self._packed[number]
        self._remap.look_up(table, feature, _of(ids, bounds, self._keys.index(feature)))  # names the ID


def _of(ids: npt.NDArray[np.integer], bounds: npt.NDArray[np.int64], source: int) -> npt.NDArray[np.int64]:
    return ids[bounds[source] : bounds[source + 1]].astype(np.int64, copy=False)


def _rows_and_width(config: BaseEmbeddingConfig) -> tuple[int, int]:
    stock = config.physical() if isinstance(config, CompositionalConfig) else config
    return int(stock.num_embeddings), int(stock.embedding_dim)


def _form(pointer_map: PointerMap) -> PointerFormat:
    return pointer_map.word_format if pointer_map.stored is None else pointer_map.pointer_format


def _by_position(remap: Remap, table: str) -> PointerMap | None:
    """The map of a CCE table whose raw IDs are positions."""
    found = remap.pointer_map(table) if table in remap.cce_tables() else None
    return None if found is None or found.takes_any_id else found


def _shape(remap: Remap, table: str, number: int, source: int) -> FeatureTable:
    config = remap.config(table)
    scheme, pointer_map = remap.schemes[table], _by_position(remap, table)
    width = config.embedding_dim // scheme.num_columns
    common: dict[str, Any] = {"table": number, "source": source, "width": width, "is_mean": pools_by_mean(config)}
    common["table_rows"], _ = _rows_and_width(config)
    common |= {"num_columns": scheme.num_columns, "num_terms": scheme.num_terms}
    if pointer_map is not None:
        k = pointer_map.num_rows
        return FeatureTable(**common, bits=_form(pointer_map).bits, column_rows=2 * k, term_rows=k)
    if isinstance(scheme, HashedScheme):
        k, terms = scheme.terms[0].num_rows, scheme.num_terms
        bits = PointerFormat.that_holds(k, num_columns=scheme.num_columns).bits
        return FeatureTable(**common, bits=bits, column_rows=terms * k, term_rows=k)
    return FeatureTable(**common, bits=64, column_rows=0, term_rows=0)  # a code is a row


def _codes(remap: Remap, table: str, shape: FeatureTable, word: int) -> Codes | None:
    """How IDs become codes; None where the remap must say which rows they read."""
    config, scheme, pointer_map = remap.config(table), remap.schemes[table], _by_position(remap, table)
    common: dict[str, Any] = {"source": shape.source, "first_word": word, "bits": shape.bits}
    if pointer_map is not None:
        assert isinstance(config, CCEConfig)
        helper = [pointer_map.helper_hash] if config.use_helper else []
        if pointer_map.stored is None:
            hashes = [pointer_map.codebook_hash, *helper]
            return Codes(**common, num_ids=pointer_map.num_ids, hashes=hashes)
        return Codes(**common, num_ids=pointer_map.num_ids, pointers=pointer_map.stored_view, hashes=helper)
    if isinstance(scheme, HashedScheme):
        return Codes(**common, num_ids=scheme.num_ids, hashes=scheme.terms)
    if isinstance(scheme, FullScheme):
        return Codes(**common, num_ids=scheme.num_ids)
    return None


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
        device = stock.device if isinstance(stock, Replicas) else _device_of(stock)
        if _has_hooks(stock) or not takes_words(device) or not _can_come_to(device, features):
            return None
        places = stock.places() if isinstance(stock, Replicas) else None
        if isinstance(stock, Replicas) and places is None:
            return None
        keys = features.keys()
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
        can_be = is_raw and can_be_packed(remap, self.tables)
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


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
