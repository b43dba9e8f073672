"""Pooled collections in TorchRec's IR serializer: a program keeps tables and maps, and gives a collection back.

TorchRec has a dictionary of the classes that it can keep; importing this file adds ours, where there is such a
dictionary. TorchRec's wheel has none.
"""

import io
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_cce.errors import ConfigError
from torchrec_cce.maps.arrow_file import Sink
from torchrec_cce.maps.bundle import read_folder, write_bundle
from torchrec_cce.maps.manifest import Provenance
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.methods import registry  # noqa: F401  whose methods describe tables
from torchrec_cce.methods.residents import ResidentConfig
from torchrec_cce.modules.embedding_bag import CCEEmbeddingBagCollection
from torchrec_cce.modules.snapshots import snapshot_of

_MAPS = "ir_maps"
"""The buffer of the maps: a zip file of a version's files."""
_ENUMS = {"data_type": DataType, "pooling": PoolingType}
_LEFT_OUT = ("init_fn", "virtual_table_eviction_policy")
"""Functions and policies, which TorchRec leaves out, too."""


class RestoredEmbeddingBagCollection(CCEEmbeddingBagCollection):
    """What a program gives back.

    To `isinstance` it is an `EmbeddingBagCollection` of TorchRec's, too: whatever reads programs asks for that, to put
    collections into feature processors and to link them to `KTRegroupAsDict`.
    """


EmbeddingBagCollection.register(RestoredEmbeddingBagCollection)


class CollectionSerializer:
    """What TorchRec's `JsonSerializer` asks for.

    Configurations of all tables are kept, and maps with their generation, digest and version. Weights are loaded
    afterwards, by `load_state_dict`, as those of stock collections are.
    """

    _module_cls = CCEEmbeddingBagCollection

    @classmethod
    def swap_meta_forward(cls, module: nn.Module) -> None:
        module.forward = _shapes_of.__get__(module)

    @classmethod
    def serialize_to_dict(cls, module: nn.Module) -> dict[str, Any]:
        """Raises ConfigError while a phase of residents is open: private rows are no part of a map."""
        assert isinstance(module, CCEEmbeddingBagCollection)
        if module.phase_is_open:
            raise ConfigError("a phase of residents is open, whose rows no map has; recluster first, which folds them")
        tables = {table.name: snapshot_of(table, module.pointer_map(table.name)) for table in module.cce_configs()}
        if tables:
            module.register_buffer(_MAPS, _to_tensor(tables), persistent=False)
        return {
            "tables": [_to_dict(table) for table in module.embedding_bag_configs()],
            "is_weighted": module.is_weighted(),
            "device": str(module.device),
            "versions": {name: table.pointer_map.version for name, table in tables.items()},
        }

    @classmethod
    def deserialize_from_dict(
        cls, metadata_dict: dict[str, Any], device: torch.device | None = None, unflatten_ep: nn.Module | None = None
    ) -> nn.Module:
        assert unflatten_ep is not None
        collection = RestoredEmbeddingBagCollection(
            tables=[_from_dict(table) for table in metadata_dict["tables"]],
            is_weighted=metadata_dict["is_weighted"],
            device=torch.device(metadata_dict["device"]) if device is None else device,
        )
        if versions := metadata_dict["versions"]:
            with _tables_of(unflatten_ep.get_buffer(_MAPS)) as tables:
                for name, version in versions.items():
                    found = tables[name].pointer_map
                    collection.attach_pointer_map(name, found if version is None else found.published_as(version))
        return collection


def qualname(kind: type) -> str:
    """The name by which TorchRec finds a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _shapes_of(collection: CCEEmbeddingBagCollection, features: KeyedJaggedTensor) -> KeyedTensor:
    """What stands for a lookup in a program, as TorchRec has it: embeddings of the right shape."""
    inputs = [features.values(), features.weights_or_none(), features.lengths_or_none(), features.offsets_or_none()]
    parts = torch.ops.torchrec.ir_emb_lookup(inputs, features.stride(), collection.combine.dims)
    return collection.combine.label(torch.cat(parts, dim=1))


def _to_tensor(tables: Mapping[str, TableSnapshot]) -> torch.Tensor:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:

        @contextmanager
        def open_file(name: str) -> Iterator[Sink]:
            with archive.open(name, "w", force_zip64=True) as file:
                yield file

        write_bundle(open_file, tables, provenance=Provenance.of_this_code())
    return torch.frombuffer(bytearray(content.getbuffer()), dtype=torch.uint8)


@contextmanager
def _tables_of(content: torch.Tensor) -> Iterator[dict[str, TableSnapshot]]:
    with tempfile.TemporaryDirectory() as folder:  # maps stay mapped when the files' names are gone
        with zipfile.ZipFile(io.BytesIO(content.cpu().numpy().tobytes())) as archive:
            archive.extractall(folder)
        yield read_folder(Path(folder))[1]


def _to_dict(table: EmbeddingBagConfig) -> dict[str, Any]:
    values = {field.name: getattr(table, field.name) for field in fields(table) if field.name not in _LEFT_OUT}
    values |= {name: values[name].value for name in _ENUMS}
    if values.get("residents") is not None:
        values["residents"] = asdict(values["residents"])
    return {"class": qualname(type(table)), **values}


def _from_dict(described: Mapping[str, Any]) -> EmbeddingBagConfig:
    values = dict(described)
    name = values.pop("class")
    known = {qualname(each): each for each in _kinds(EmbeddingBagConfig)}
    if name not in known:
        raise ConfigError(f"the program has a table described by {name}; import it first")
    for enum_name, enum in _ENUMS.items():
        values[enum_name] = enum(values[enum_name])
    if values.get("residents") is not None:
        values["residents"] = ResidentConfig(**values["residents"])
    return known[name](**values)


def _kinds(kind: type[EmbeddingBagConfig]) -> Iterator[type[EmbeddingBagConfig]]:
    """`kind` and all that derives from it, as far as it was imported; our own was, by the registry of methods."""
    yield kind
    for derived in kind.__subclasses__():
        yield from _kinds(derived)


if find_spec("torchrec.ir") is not None:
    from torchrec.ir.serializer import JsonSerializer

    for _kind in (CCEEmbeddingBagCollection, RestoredEmbeddingBagCollection):
        JsonSerializer.module_to_serializer_cls[qualname(_kind)] = type(
            CollectionSerializer.__name__, (CollectionSerializer, JsonSerializer), {}
        )
