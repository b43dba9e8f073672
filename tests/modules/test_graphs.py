"""Graphs of collections, by `torch.export`, `torch.fx` and `torch.compile`, give what the collections give; and what
they give on the meta device."""

import copy
import io
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim
from torchrec import EmbeddingBagConfig, EmbeddingConfig, KeyedJaggedTensor, KeyedTensor, PoolingType

from tests.support.module_cases import cce, full, random_features
from torchrec_cce import (
    CCEEmbeddingBagCollection,
    CCEEmbeddingCollection,
    CCEEmbeddingConfig,
    CompositionalEmbeddingBagConfig,
    CompositionalEmbeddingConfig,
    ResidentConfig,
)
from torchrec_cce.errors import ConfigError
from torchrec_cce.maps.vocabulary import Vocabulary
from torchrec_cce.methods.quotient_remainder import QuotientRemainderEmbeddingBagConfig
from torchrec_cce.methods.sketch import SketchEmbeddingBagConfig

Collection = CCEEmbeddingBagCollection | CCEEmbeddingCollection
UNIVERSES = {"user": 1000, "item": 300, "day": 7}


def features(seed: int, batch: int = 20, *, weighted: bool = False) -> KeyedJaggedTensor:
    return random_features(UNIVERSES, batch, 3, seed=seed, weighted=weighted)


class OfTensors(nn.Module):
    """A collection with tensors as inputs and outputs."""

    def __init__(self, collection: Collection) -> None:
        super().__init__()
        self.collection = collection

    def forward(self, values: torch.Tensor, lengths: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        found = self.collection(KeyedJaggedTensor(list(UNIVERSES), values, lengths=lengths, weights=weights))
        if isinstance(self.collection, CCEEmbeddingBagCollection):
            pooled: torch.Tensor = found.values()
            return pooled
        return torch.cat([found[name].values() for name in sorted(UNIVERSES)])


class Scripted(nn.Module):
    """A model that `torch.jit.script` understands, but for its collection."""

    def __init__(self, tables: CCEEmbeddingBagCollection) -> None:
        super().__init__()
        self.tables = tables

    def forward(self, batch: KeyedJaggedTensor) -> torch.Tensor:
        return self.tables(batch).values()


def inputs(batch: KeyedJaggedTensor) -> tuple[torch.Tensor, ...]:
    weights = batch.weights_or_none()
    return (batch.values(), batch.lengths()) if weights is None else (batch.values(), batch.lengths(), weights)


def exported(model: OfTensors, batch: KeyedJaggedTensor) -> torch.export.ExportedProgram:
    dynamic = {"values": {0: Dim.AUTO}, "lengths": {0: Dim.AUTO}, "weights": {0: Dim.AUTO}}
    given = inputs(batch)
    names = list(dynamic)[: len(given)]
    return torch.export.export(model, given, dynamic_shapes={name: dynamic[name] for name in names})


def with_arbitrary_ids(collection: CCEEmbeddingBagCollection) -> CCEEmbeddingBagCollection:
    keys = np.random.default_rng(0).permutation(1000)[:600]  # so that 400 are not known
    plain = collection.pointer_map("t_user")
    collection.attach_pointer_map("t_user", plain.with_vocabulary(Vocabulary.build(keys), unseen="hash"))
    return collection


def clustered(collection: Any) -> Any:
    collection.recluster(seed=1)
    return collection


def item(kind: Any, **sizes: Any) -> Any:
    return kind(name="t_item", num_embeddings=300, embedding_dim=16, feature_names=["item"], **sizes)


def pooled(*tables: EmbeddingBagConfig, **options: Any) -> CCEEmbeddingBagCollection:
    return CCEEmbeddingBagCollection(tables=[*tables], **options)


FULL = item(EmbeddingBagConfig)
CASES = {
    "full": lambda: pooled(cce(), full(), FULL),
    "clustered, and a hashed table": lambda: clustered(
        pooled(cce(), full(), item(CompositionalEmbeddingBagConfig, num_rows=9, num_columns=2, num_terms=2))
    ),
    "means, 4 bits, quotients": lambda: clustered(
        pooled(
            cce(pooling=PoolingType.MEAN, min_pointer_bits=4),
            full(),
            item(QuotientRemainderEmbeddingBagConfig, num_rows=20, pooling=PoolingType.MEAN),
        )
    ),
    "arbitrary IDs": lambda: with_arbitrary_ids(clustered(pooled(cce(), full(), FULL))),
    "signs": lambda: pooled(cce(), full(), item(CompositionalEmbeddingBagConfig, num_rows=9, signed=True)),
    "weights": lambda: clustered(pooled(cce(), full(), FULL, is_weighted=True)),
    "residents": lambda: clustered(pooled(cce(residents=ResidentConfig(fraction=0.5)), full(), FULL)),
    "computed": lambda: pooled(cce(), full(), item(SketchEmbeddingBagConfig, num_rows=9, num_terms=2)),
    "sequences": lambda: clustered(
        CCEEmbeddingCollection(
            tables=[
                CCEEmbeddingConfig(
                    name="t_user", num_embeddings=1000, embedding_dim=16, feature_names=["user"], num_rows=10
                ),
                item(CompositionalEmbeddingConfig, num_rows=9, num_columns=2, num_terms=2),
                EmbeddingConfig(name="t_day", num_embeddings=7, embedding_dim=16, feature_names=["day"]),
            ]
        )
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_an_exported_program_gives_the_same_for_other_batches(case: str) -> None:
    model, weighted = OfTensors(CASES[case]()), case == "weights"
    program = exported(model, features(0, weighted=weighted))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [target for target in targets if "torchrec" in target]  # it runs without this package
    run = program.module()
    for batch in (features(1, weighted=weighted), features(2, batch=7, weighted=weighted)):
        torch.testing.assert_close(run(*inputs(batch)), model(*inputs(batch)), atol=1e-6, rtol=0)


def test_an_exported_program_refuses_other_ids() -> None:
    model = OfTensors(clustered(pooled(cce(), full(), FULL)))
    run = exported(model, features(0)).module()
    for strange in (1000, -1):
        batch = features(0)
        batch.values()[0] = strange
        with pytest.raises(RuntimeError, match=r"'user': a raw ID is not in 0\.\.999, the universe of table 't_user'"):
            run(*inputs(batch))


def test_a_program_keeps_the_map_that_it_was_exported_with() -> None:
    model = OfTensors(clustered(pooled(cce(), full(), FULL)))
    before = model(*inputs(features(0)))
    kept = io.BytesIO()  # in memory, a program shares its weights with the model
    torch.export.save(exported(model, features(0)), kept)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_()
    model.collection.recluster(seed=2)
    kept.seek(0)
    found = torch.export.load(kept).module()(*inputs(features(0)))
    torch.testing.assert_close(found, before, atol=1e-6, rtol=0)
    for _ in range(2):  # nothing of an export is left for the next
        again = exported(model, features(0)).module()(*inputs(features(0)))
        torch.testing.assert_close(again, model(*inputs(features(0))), atol=1e-5, rtol=1e-5)


def test_private_rows_cannot_be_exported() -> None:
    model = OfTensors(pooled(cce(residents=ResidentConfig(fraction=0.5)), full(), FULL))
    model.collection.admit(seed=0)
    with pytest.raises(ConfigError, match=r"a phase of residents is open.*recluster first"):
        exported(model, features(0))


def test_variable_batches_cannot_be_exported_and_traces_refuse_them() -> None:
    collection = pooled(cce(), full())
    values, lengths = torch.tensor([3, 5, 6]), torch.tensor([1, 1, 1])
    variable = KeyedJaggedTensor(["user", "day"], values, lengths=lengths, stride_per_key_per_rank=[[2], [1]])
    with pytest.raises(ConfigError, match="batches of one size"):
        torch.export.export(collection, (variable,))
    with pytest.raises(RuntimeError):
        torch.fx.symbolic_trace(collection)(variable)


@pytest.mark.parametrize("case", ["full", "clustered, and a hashed table", "means, 4 bits, quotients", "arbitrary IDs"])
def test_symbolic_traces_and_scripts_of_them(case: str) -> None:
    collection = CASES[case]()
    traced = torch.fx.symbolic_trace(collection)
    scripted = torch.jit.script(traced)
    for seed in (0, 1):
        batch = features(seed)
        expected: KeyedTensor = collection(batch)
        for graph in (traced, scripted):
            found = graph(batch)
            assert found.keys() == expected.keys()
            torch.testing.assert_close(found.values(), expected.values(), atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:torch.jit.script takes the symbolic trace")
def test_a_script_of_a_model_has_the_trace_of_its_collections() -> None:
    model = Scripted(CASES["clustered, and a hashed table"]())
    collection = model.tables
    sequences = CASES["sequences"]()
    with pytest.warns(UserWarning, match=r"script copy\.deepcopy\(model\)"):
        scripted = torch.jit.script(copy.deepcopy(model))
    assert model.tables is collection
    for seed in (0, 1):
        torch.testing.assert_close(scripted(features(seed)), model(features(seed)), atol=1e-6, rtol=0)
    of_sequences, expected = torch.jit.script(sequences)(features(2)), sequences(features(2))
    for name, found in of_sequences.items():
        torch.testing.assert_close(found.values(), expected[name].values(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("need_indices", [True, False])
@pytest.mark.parametrize("kind", [EmbeddingConfig, CCEEmbeddingConfig])
def test_sequences_are_traced_with_raw_ids_beside_the_embeddings(kind: Any, need_indices: bool) -> None:
    sizes = {} if kind is EmbeddingConfig else {"num_rows": 10}
    collection = CCEEmbeddingCollection(tables=[item(kind, **sizes)], need_indices=need_indices)
    scripted = torch.jit.script(torch.fx.symbolic_trace(collection))
    expected, found = collection(features(0))["item"], scripted(features(0))["item"]
    torch.testing.assert_close(found.values(), expected.values(), atol=1e-6, rtol=0)
    assert torch.equal(found.lengths(), expected.lengths())
    if need_indices:
        assert torch.equal(found.weights(), expected.weights())
    else:
        assert found.weights_or_none() is None


@pytest.mark.parametrize("case", list(CASES))
def test_on_the_meta_device(case: str) -> None:
    collection = CASES[case]()
    kind, options = type(collection), {"is_weighted": True} if case == "weights" else {}
    on_meta = kind(tables=collection.configs(), device=torch.device("meta"), **options)
    batch = features(0, weighted=case == "weights")
    found, expected = on_meta(batch.to(torch.device("meta"))), collection(batch)
    if isinstance(expected, KeyedTensor):
        assert (found.values().shape, found.values().device.type) == (expected.values().shape, "meta")
    else:
        assert {key: each.values().shape[1] for key, each in found.items()} == dict.fromkeys(UNIVERSES, 16)


def test_a_compiled_model_is_whole_and_follows_the_maps() -> None:
    collection = pooled(cce(), full(), FULL)
    model = OfTensors(collection)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for generation in range(3):
        for seed, batch in ((0, 20), (1, 7)):
            given = inputs(features(seed, batch))
            expected, found = model(*given), compiled(*given)
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
            gradients = [
                torch.autograd.grad(each.square().sum(), list(model.parameters())) for each in (expected, found)
            ]
            for plain, whole in zip(*gradients, strict=True):
                torch.testing.assert_close(whole, plain, atol=1e-6, rtol=0)
        collection.recluster(seed=generation)
    strange = features(0)
    strange.values()[0] = 1000
    with pytest.raises(Exception, match=re.escape("raw ID 1000 (position 0")):
        compiled(*inputs(strange))


def test_a_remap_that_is_compiled_by_itself_breaks_the_graph_and_is_right() -> None:
    """As where a sharded collection, or TorchRec's pipeline of compiled models, runs it."""
    collection, features = CCEEmbeddingBagCollection([cce()]), random_features({"user": 1000}, 8, 3, seed=0)
    compiled = torch.compile(collection.remap, backend="eager")
    for seed in (0, 1):
        assert torch.equal(compiled(features).values(), collection.remap(features).values())
        collection.recluster(seed=seed)
