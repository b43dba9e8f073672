"""Sequences with residents against a plain reference: an ID has its codewords, and its row if it has one."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec import EmbeddingConfig, KeyedJaggedTensor
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from tests.support.module_cases import random_features
from torchrec_cce import (
    CCEEmbeddingBagCollection,
    CCEEmbeddingBagConfig,
    CCEEmbeddingCollection,
    CCEEmbeddingConfig,
    ResidentConfig,
)
from torchrec_cce.errors import ConfigError
from torchrec_cce.modules.quantized_rows import QuantizedTable
from torchrec_cce.modules.state_names import quantized_rows

N, D = 200, 8
KEYS = {"day": 7, "b": N, "unused": 3, "a": N, "word": N}
TABLES = ("t", "narrow")
DTYPES = ("float32", "float16", "int8")


def collection(dtype: str = "float32", *, need_indices: bool = False, device: str = "cpu") -> CCEEmbeddingCollection:
    """Tables with residents of widths 2 and 4, one of two features; one without residents; and a full one."""
    torch.manual_seed(0)
    sizes = {"num_embeddings": N, "embedding_dim": D, "num_rows": 5}
    residents = ResidentConfig(fraction=0.3, dtype=dtype, learning_rate=0.1)
    tables = [
        CCEEmbeddingConfig(name="t", feature_names=["a", "b"], num_columns=4, residents=residents, **sizes),
        EmbeddingConfig(name="d", num_embeddings=7, embedding_dim=D, feature_names=["day"]),
        CCEEmbeddingConfig(name="narrow", feature_names=["word"], num_columns=2, residents=residents, **sizes),
        CCEEmbeddingConfig(name="plain", feature_names=["a"], num_columns=2, **sizes),
    ]
    return CCEEmbeddingCollection(tables=tables, need_indices=need_indices, device=torch.device(device))


def config(one: CCEEmbeddingCollection, table: str) -> CCEEmbeddingConfig:
    found = one.remap.config(table)
    assert isinstance(found, CCEEmbeddingConfig)
    return found


def codewords(one: CCEEmbeddingCollection, table: str) -> torch.nn.Parameter:
    return one.get_parameter(one.weight_name(table))


def quantized(one: CCEEmbeddingCollection, table: str) -> QuantizedTable:
    found = one.get_submodule(quantized_rows(config(one, table).resident_table))
    assert isinstance(found, QuantizedTable)
    return found


def rows_of(one: CCEEmbeddingCollection, table: str) -> torch.Tensor:
    if config(one, table).has_stock_residents:
        return one.get_parameter(one.residents_name(config(one, table))).detach()
    return quantized(one, table).rows.float() * float(quantized(one, table).step)


def learned(dtype: str = "float32", *, need_indices: bool = False) -> CCEEmbeddingCollection:
    """In an open phase, with codewords and rows that are not zero."""
    one = collection(dtype, need_indices=need_indices)
    for table in TABLES:
        torch.nn.init.normal_(codewords(one, table))
    one.admit(seed=1)
    for table in TABLES:
        rows = torch.randn(60, D)
        if dtype == "float32":
            with torch.no_grad():
                one.get_parameter(one.residents_name(config(one, table))).copy_(rows)
        else:
            quantized(one, table).rows.copy_((rows / float(quantized(one, table).step)).clamp(-127, 127))
    return one


def embeddings(one: CCEEmbeddingCollection, table: str, *, with_rows: bool = True) -> torch.Tensor:
    """[N, D] of all IDs of a table with residents."""
    columns = config(one, table).num_columns
    codes = torch.from_numpy(one.pointer_map(table).codebook_codes(np.arange(N)).astype(np.int64))
    codebook = codewords(one, table).detach().view(columns, 2, 5, -1)[:, 0]
    whole = torch.cat([codebook[j][codes[:, j]] for j in range(columns)], dim=1)
    residency = one.remap.residency(table)
    if with_rows and residency.is_open:
        residents = torch.from_numpy(np.flatnonzero(residency.ages == 0))
        whole[residents] += rows_of(one, table)[: len(residents)]
    return whole


def assert_equals_reference(
    one: CCEEmbeddingCollection, features: KeyedJaggedTensor, *, with_rows: bool = True
) -> None:
    found = one(features)
    assert list(found) == ["a@t", "b", "day", "word", "a@plain"]
    for name, (table, feature) in {"a@t": ("t", "a"), "b": ("t", "b"), "word": ("narrow", "word")}.items():
        ids = features[feature].values()
        expected = embeddings(one, table, with_rows=with_rows)[ids]
        torch.testing.assert_close(found[name].values(), expected, atol=1e-6, rtol=1e-6)
        assert torch.equal(found[name].lengths(), features[feature].lengths())
        if one.need_indices():
            assert torch.equal(found[name].weights(), ids)


@given(
    batch_size=st.integers(1, 5),
    max_length=st.integers(0, 4),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from(DTYPES),
    need_indices=st.booleans(),
    with_rows=st.booleans(),
)
def test_an_embedding_is_that_of_the_codewords_and_the_row(
    batch_size: int, max_length: int, seed: int, dtype: str, need_indices: bool, with_rows: bool
) -> None:
    one = learned(dtype, need_indices=need_indices)
    one.remap.leaves_out_residents = not with_rows
    assert_equals_reference(one, random_features(KEYS, batch_size, max_length, seed), with_rows=with_rows)


def test_a_variable_batch() -> None:
    features = KeyedJaggedTensor(
        keys=["a", "word", "b", "day"],
        values=torch.cat([torch.arange(12, dtype=torch.int64) * 7, torch.tensor([3])]),
        lengths=torch.tensor([3, 0, 4, 1, 4, 1]),
        stride_per_key_per_rank=[[2], [1], [2], [1]],
        inverse_indices=(["a", "word", "b", "day"], torch.tensor([[0, 1, 0], [0, 0, 0], [1, 1, 0], [0, 0, 0]])),
    )
    assert_equals_reference(learned(), features)  # unsharded tables do not repeat


def test_a_batch_that_is_remapped_before_passes_through() -> None:
    one, features = learned(), random_features(KEYS, 6, 4, seed=0)
    found = one(one.remap(features))
    for name, sequence in one(features).items():
        assert torch.equal(found[name].values(), sequence.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_a_phase_rows_learn_and_codewords_are_frozen_and_afterwards_the_reverse(dtype: str) -> None:
    one, features = learned(dtype), random_features(KEYS, 12, 4, seed=0)
    before = {table: rows_of(one, table).clone() for table in TABLES}
    optimizer = RowWiseAdagrad(one.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        sum(sequence.values().square().sum() for sequence in one(features).values()).backward()
        optimizer.step()

    step()
    for table in TABLES:
        assert codewords(one, table).grad is None
        assert not torch.equal(rows_of(one, table), before[table])
    assert codewords(one, "plain").grad is not None
    one.recluster(seed=0, optimizer=optimizer)
    after = {table: rows_of(one, table).clone() for table in TABLES}
    step()
    for table in TABLES:
        assert codewords(one, table).grad.abs().sum() > 0
        assert torch.equal(rows_of(one, table), after[table])


def test_gradients_of_rows_are_those_of_a_plain_lookup() -> None:
    one, features = learned(), random_features(KEYS, 12, 4, seed=0)
    leaves = {table: rows_of(one, table).clone().requires_grad_() for table in TABLES}
    total = torch.zeros(())
    for name, (table, feature) in {"a@t": ("t", "a"), "b": ("t", "b"), "word": ("narrow", "word")}.items():
        ids = features[feature].values()
        whole = embeddings(one, table, with_rows=False)
        residents = torch.from_numpy(np.flatnonzero(one.remap.residency(table).ages == 0))
        plain = whole.index_add(0, residents, leaves[table])[ids]
        cotangent = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1))
        (plain.tanh() * cotangent).sum().backward()
        total = total + (one(features)[name].values().tanh() * cotangent).sum()
    total.backward()
    for table, leaf in leaves.items():
        found = one.get_parameter(one.residents_name(config(one, table))).grad
        torch.testing.assert_close(found, leaf.grad, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_phases_are_those_of_a_pooled_collection_with_the_same_rows(dtype: str) -> None:
    """Trained on bags of one ID: admitted IDs, maps, codewords and rows are the same bits."""
    residents = ResidentConfig(fraction=0.3, dtype=dtype, learning_rate=0.1)
    sizes = {"num_embeddings": N, "embedding_dim": D, "num_rows": 5, "residents": residents, "feature_names": ["a"]}
    unpooled = CCEEmbeddingCollection(tables=[CCEEmbeddingConfig(name="t", **sizes)])
    pooled = CCEEmbeddingBagCollection(tables=[CCEEmbeddingBagConfig(name="t", **sizes)])
    optimizers = [RowWiseAdagrad(each.parameters(), lr=0.1) for each in (unpooled, pooled)]
    for phase in range(3):
        for each, optimizer in zip((unpooled, pooled), optimizers, strict=True):
            each.admit(seed=phase, optimizer=optimizer if dtype == "float32" else None)
        for step in range(3):
            ids = torch.from_numpy(np.random.default_rng([phase, step]).integers(0, N, 50))
            features = KeyedJaggedTensor(keys=["a"], values=ids, lengths=torch.ones(50, dtype=torch.int64))
            for each, optimizer in zip((unpooled, pooled), optimizers, strict=True):
                optimizer.zero_grad()
                (each(features)["a"].values() if each is unpooled else each(features)["a"]).cos().sum().backward()
                optimizer.step()
        reports = [each.recluster(seed=phase)["t"] for each in (unpooled, pooled)]
        assert reports[0].objective == reports[1].objective
        assert unpooled.pointer_map("t").digest == pooled.pointer_map("t").digest
        assert torch.equal(
            unpooled.state_dict()[unpooled.weight_name("t")], pooled.state_dict()[pooled.weight_name("t")]
        )
        assert np.array_equal(unpooled.remap.residency("t").ages, pooled.remap.residency("t").ages)


def test_names_copies_and_the_meta_device() -> None:
    one, features = learned(), random_features(KEYS, 6, 4, seed=0)
    assert {name for name in one.state_dict() if not name.startswith("remap")} == {
        "codewords.2.embeddings.t.weight",
        "codewords.4.embeddings.narrow.weight",
        "ecs.8.embeddings.d.weight",
        "ecs.4.embeddings.plain.weight",
        "residents.embeddings.t_residents.weight",
        "residents.embeddings.narrow_residents.weight",
    }
    assert_equals_reference(copy.deepcopy(one), features)
    for dtype in DTYPES:
        other = collection(dtype, device="meta").to_empty(device="cpu")
        other.reset_parameters()
        for table in TABLES:
            assert not rows_of(other, table).any()
            assert not codewords(other, table).any()
        if dtype == "float32":
            for table in TABLES:
                other.remap.attach_residency(table, one.remap.residency(table))
            other.load_state_dict(one.state_dict())
            assert_equals_reference(other, features)


def test_what_cannot_be_is_refused() -> None:
    one = learned()
    with pytest.raises(ConfigError, match="a phase of residents is open; recluster first"):
        one.admit(seed=1)
    with pytest.raises(ConfigError, match="'d' is not a table with residents; those are: t, narrow"):
        one.remap.residency("d")
