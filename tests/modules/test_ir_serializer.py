"""Pooled collections in programs of TorchRec's IR serializer: tables, maps and what is refused."""

import json
import pickle
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, PoolingType

from tests.support.module_cases import cce, full, random_features
from torchrec_cce import CCEEmbeddingBagCollection, Registry, ResidentConfig, tables_under_cap
from torchrec_cce.errors import ConfigError, MapMismatchError
from torchrec_cce.maps.vocabulary import Vocabulary
from torchrec_cce.methods.registry import METHODS
from torchrec_cce.modules.ir_serializer import CollectionSerializer, RestoredEmbeddingBagCollection, qualname
from torchrec_cce.sharding.constraints import column_constraints, small_collections

IS_THERE = find_spec("torchrec.ir") is not None

UNIVERSES = {"user": 1000, "day": 7}


def features(seed: int = 0) -> KeyedJaggedTensor:
    return random_features(UNIVERSES, 20, 3, seed=seed)


def shapes(tensors: list[torch.Tensor | None], batch_size: int, dims: list[int]) -> list[torch.Tensor]:
    """TorchRec's operator, where TorchRec does not have it."""
    assert [tensor is None for tensor in tensors] == [False, True, False, True]
    return [torch.empty(batch_size, dim) for dim in dims]


def restored(collection: CCEEmbeddingBagCollection, device: str | None = None) -> RestoredEmbeddingBagCollection:
    """By what a program keeps: a document, and buffers."""
    document = json.dumps(CollectionSerializer.serialize_to_dict(collection))
    program = nn.Module()
    for name, buffer in collection.named_buffers(recurse=False):
        program.register_buffer(name, buffer.clone())
    given = None if device is None else torch.device(device)
    found = CollectionSerializer.deserialize_from_dict(json.loads(document), given, program)
    assert isinstance(found, RestoredEmbeddingBagCollection)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_tables_of_every_method_come_back_as_they_were_described(method: str) -> None:
    stock = [full(), full("t_user", ("user",), num_embeddings=1000, pooling=PoolingType.MEAN)]
    collection = CCEEmbeddingBagCollection(tables=tables_under_cap(stock, method=method, max_parameters=3000))
    again = restored(collection)
    assert [type(table) for table in again.configs()] == [type(table) for table in collection.configs()]
    for found, table in zip(again.configs(), collection.configs(), strict=True):
        assert replace(found, init_fn=nn.init.zeros_) == replace(table, init_fn=nn.init.zeros_)
    again.load_state_dict(collection.state_dict())
    assert torch.equal(again(features()).values(), collection(features()).values())


@pytest.mark.filterwarnings("ignore:weights were taken by state_dict")
def test_maps_come_back_with_their_identity_and_weights_of_others_are_refused(tmp_path) -> None:
    collection = CCEEmbeddingBagCollection(tables=[cce(), full()])
    collection.recluster(seed=1)
    registry = Registry(tmp_path)
    registry.publish(collection.snapshot())
    registry.open().attach(collection)
    again = restored(collection)
    assert again.pointer_map("t_user").identity == collection.pointer_map("t_user").identity
    assert again.pointer_map("t_user").version == 1
    again.load_state_dict(collection.state_dict())
    assert torch.equal(again(features()).values(), collection(features()).values())
    collection.recluster(seed=1)
    with pytest.raises(MapMismatchError):
        again.load_state_dict(collection.state_dict())


def test_vocabularies_and_weighted_bags_come_back() -> None:
    collection = CCEEmbeddingBagCollection(tables=[cce(), full()], is_weighted=True)
    keys = np.random.default_rng(0).permutation(1000)[:600]
    plain = collection.pointer_map("t_user")
    collection.attach_pointer_map("t_user", plain.with_vocabulary(Vocabulary.build(keys), unseen="hash"))
    collection.recluster(seed=1)
    again = restored(collection)
    assert again.is_weighted()
    again.load_state_dict(collection.state_dict())
    batch = random_features(UNIVERSES, 20, 3, seed=1, weighted=True)
    assert torch.equal(again(batch).values(), collection(batch).values())


def test_what_is_restored_can_be_kept_again_and_is_taken_for_a_stock_collection() -> None:
    again = restored(CCEEmbeddingBagCollection(tables=[cce(), full()]), device="meta")
    assert again.device.type == "meta"
    assert isinstance(again, EmbeddingBagCollection)
    assert isinstance(pickle.loads(pickle.dumps(restored(again))), RestoredEmbeddingBagCollection)


def test_the_planner_treats_what_is_restored_as_it_treats_others() -> None:
    collection = CCEEmbeddingBagCollection(tables=[cce(), full()])
    constraints = column_constraints(collection.configs())
    small = small_collections(collection, constraints, batch_size=1024)
    assert small == {"t_user", "t_day"}
    assert small_collections(restored(collection), constraints, batch_size=1024) == small


def test_in_a_program_a_lookup_is_its_shapes() -> None:
    collection = CCEEmbeddingBagCollection(tables=[cce(), full(embedding_dim=8)])
    expected = collection(features())
    if not IS_THERE:
        torch.library.custom_op("torchrec::ir_emb_lookup", shapes, mutates_args=())
    CollectionSerializer.swap_meta_forward(collection)
    found = collection(features())
    assert (found.keys(), found.length_per_key()) == (expected.keys(), expected.length_per_key())
    assert found.values().shape == expected.values().shape


def test_what_cannot_be_kept_is_refused() -> None:
    collection = CCEEmbeddingBagCollection(tables=[cce(residents=ResidentConfig()), full()])
    collection.admit(seed=1)
    with pytest.raises(ConfigError, match=r"phase of residents is open.*recluster first"):
        CollectionSerializer.serialize_to_dict(collection)
    collection.recluster(seed=1)
    assert restored(collection).configs()[0].residents == ResidentConfig()
    document = CollectionSerializer.serialize_to_dict(collection)
    document["tables"][0]["class"] = "elsewhere.Config"
    with pytest.raises(ConfigError, match=r"described by elsewhere\.Config; import it first"):
        CollectionSerializer.deserialize_from_dict(document, None, nn.Module())


@pytest.mark.skipif(not IS_THERE, reason="TorchRec's wheel has no torchrec.ir")
def test_a_whole_program() -> None:
    from torchrec.ir.serializer import JsonSerializer
    from torchrec.ir.utils import decapsulate_ir_modules, encapsulate_ir_modules
    from torchrec.modules.regroup import KTRegroupAsDict

    class Model(nn.Module):
        def __init__(self, tables: list[EmbeddingBagConfig]) -> None:
            super().__init__()
            self.tables = CCEEmbeddingBagCollection(tables=tables)
            self.regroup = KTRegroupAsDict([["day"], ["user"]], ["days", "users"])

        def forward(self, batch: KeyedJaggedTensor) -> dict[str, torch.Tensor]:
            groups: dict[str, torch.Tensor] = self.regroup([self.tables(batch)])
            return groups

    model = Model([cce(), full()])
    model.tables.recluster(seed=1)
    assert qualname(type(model.tables)) in JsonSerializer.module_to_serializer_cls
    expected, weights = model(features()), model.state_dict()
    _, names = encapsulate_ir_modules(model, JsonSerializer)
    program = torch.export.export(model, (features(),), strict=False, preserve_module_call_signature=tuple(names))
    again = decapsulate_ir_modules(
        torch.export.unflatten(program),
        JsonSerializer,
        finalize_interpreter_modules=True,
        short_circuit_pytree_ebc_regroup=True,
    )
    again.load_state_dict(weights)
    found = again(features())
    for name, group in expected.items():
        assert torch.equal(found[name], group)
