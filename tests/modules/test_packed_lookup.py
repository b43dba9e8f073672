"""Embeddings in one step against remap, stock collection and combine; and when it is left to these."""

import copy
import pickle
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, PoolingType

from tests.support.module_cases import cce, full, random_features
from torchrec_cce import (
    CCEEmbeddingBagCollection,
    CompositionalEmbeddingBagConfig,
    QuotientRemainderEmbeddingBagConfig,
    ResidentConfig,
    Vocabulary,
)
from torchrec_cce.errors import ConfigError, InvalidIDError
from torchrec_cce.maps.pointer_map import Unseen

SIZES = {"user": 1000, "friend": 1000, "item": 5000, "day": 7, "word": 300, "unused": 4}


def tables(pooling: PoolingType = PoolingType.SUM) -> list[EmbeddingBagConfig]:
    """Of all kinds and several widths; two features on one table, and one feature on two tables."""
    sizes = {"num_embeddings": 300, "feature_names": ["word"], "pooling": pooling}
    return [
        cce(features=("user", "friend"), pooling=pooling),
        cce("t_item", ("item",), num_embeddings=5000, embedding_dim=24, num_rows=300, num_columns=3, pooling=pooling),
        cce("t_small", ("item",), num_embeddings=5000, num_rows=16, min_pointer_bits=4, pooling=pooling),
        cce("t_one_term", use_helper=False, num_columns=2, pooling=pooling),
        full(pooling=pooling),
        full("t_wide", embedding_dim=130, pooling=pooling),
        CompositionalEmbeddingBagConfig(name="ce", embedding_dim=8, num_rows=20, num_columns=2, num_terms=3, **sizes),
        QuotientRemainderEmbeddingBagConfig(name="qr", embedding_dim=8, num_rows=20, operation="concat", **sizes),
    ]


def other_way(collection: CCEEmbeddingBagCollection) -> CCEEmbeddingBagCollection:
    """A copy whose stock collections have a hook, so that they must be called."""
    twin = copy.deepcopy(collection)
    for stock in stocks(twin):
        stock.register_forward_hook(lambda *_: None)
    return twin


def stocks(collection: CCEEmbeddingBagCollection) -> list[nn.Module]:
    return [stock for stock in (collection.ebc, collection.codewords) if stock is not None]


def is_packed(collection: CCEEmbeddingBagCollection, features: KeyedJaggedTensor) -> bool:
    """Whether the stock collections are left out."""
    with ExitStack() as patches, torch.no_grad():
        calls = [
            patches.enter_context(mock.patch.object(stock, "forward", wraps=stock.forward))
            for stock in stocks(collection)
        ]
        collection(features)
    return not any(each.called for each in calls)


def assert_both_ways_equal(collection: CCEEmbeddingBagCollection, features: KeyedJaggedTensor) -> None:
    twin = other_way(collection)
    assert is_packed(collection, features)
    assert not is_packed(twin, features)
    found, expected = collection(features), twin(features)
    assert found.keys() == expected.keys()
    assert found.length_per_key() == expected.length_per_key()
    torch.testing.assert_close(found.values(), expected.values(), atol=1e-6, rtol=1e-6)
    cotangent = torch.randn(expected.values().shape, generator=torch.Generator().manual_seed(0))
    for each, pooled in ((collection, found), (twin, expected)):
        each.zero_grad()
        (pooled.values() * cotangent).sum().backward()
    for mine, theirs in zip(collection.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-5)


@pytest.fixture
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("pooling", ["sum", "mean", "weighted"])
@pytest.mark.parametrize("max_length", [1, 4])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_both_ways_equal(pooling: str, max_length: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kind, weighted = PoolingType.MEAN if pooling == "mean" else PoolingType.SUM, pooling == "weighted"
    collection = CCEEmbeddingBagCollection(tables=tables(kind), is_weighted=weighted)
    features = random_features(SIZES, 40, max_length, seed=max_length, weighted=weighted)
    features = KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values().to(dtype),
        lengths=features.lengths(),
        weights=features.weights_or_none(),
    )
    assert_both_ways_equal(collection, features)  # codes by hashes
    collection.recluster(seed=0)
    assert_both_ways_equal(collection, features)


def test_losses_of_twenty_steps_with_clusterings_between_them() -> None:
    torch.manual_seed(0)
    collection = CCEEmbeddingBagCollection(tables=tables())
    losses = []
    for each in (collection, other_way(collection)):
        optimizer = torch.optim.Adagrad(each.parameters(), lr=0.1)
        losses.append([])
        for step in range(20):
            if step % 8 == 4:
                each.recluster(seed=0, optimizer=optimizer)
            optimizer.zero_grad()
            loss = each(random_features(SIZES, 30, 3, seed=step)).values().sub(1).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize(
    "sizes", [{}, {"num_rows": 300, "num_columns": 8, "embedding_dim": 32}, {"num_rows": 16, "min_pointer_bits": 4}]
)
@pytest.mark.parametrize("use_helper", [True, False])
@pytest.mark.parametrize("unseen", ["hash", "first_row"])
@pytest.mark.parametrize("has_vocabulary", [True, False])
def test_ids_of_a_vocabulary_and_unseen_ones(
    sizes: dict[str, int], use_helper: bool, unseen: Unseen, has_vocabulary: bool
) -> None:
    """In words of their codes, before and after a clustering; counted once."""
    keys = np.arange(1000)
    if has_vocabulary:
        keys = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 1000)
    collection = CCEEmbeddingBagCollection(tables=[cce(use_helper=use_helper, **sizes), full()])
    start = collection.pointer_map("t_user")
    if has_vocabulary:
        start = start.with_vocabulary(Vocabulary.build(keys))
    collection.attach_pointer_map("t_user", replace(start, unseen=unseen))
    ids = torch.cat([torch.from_numpy(keys[:50]), torch.tensor([-1, 2**62, 3000]), torch.zeros(53, dtype=torch.int64)])
    features = KeyedJaggedTensor(keys=["user", "day"], values=ids, lengths=torch.ones(106, dtype=torch.int64))
    assert_both_ways_equal(collection, features)
    collection.recluster(seed=0)
    assert_both_ways_equal(collection, features)
    lookup = collection._packed["ebc"]._last
    assert lookup is not None
    assert lookup.num_words < collection.cce_configs()[0].num_columns * (1 + use_helper), "not a word for each row"
    collection.attach_pointer_map("t_user", collection.pointer_map("t_user"))
    collection(features)
    assert collection.unseen_ids() == {"t_user": 3}


def test_a_vocabulary_of_positions_changes_no_bit() -> None:
    torch.manual_seed(0)
    plain = CCEEmbeddingBagCollection(tables=[cce(), full()])
    features = random_features({"user": 1000, "day": 7}, 40, 4, seed=1)
    for _ in ("hashed", "clustered"):
        by_keys = copy.deepcopy(plain)
        known = plain.pointer_map("t_user").with_vocabulary(Vocabulary.build(np.arange(1000)))
        by_keys.attach_pointer_map("t_user", known)
        for each in (plain, by_keys):
            each.zero_grad()
            each(features).values().square().sum().backward()
        assert torch.equal(plain(features).values(), by_keys(features).values())
        for mine, theirs in zip(plain.parameters(), by_keys.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad)
        plain.recluster(seed=0)


def test_an_id_that_a_vocabulary_lacks_is_named() -> None:
    collection = CCEEmbeddingBagCollection(tables=[cce()])
    known = Vocabulary.build(np.arange(10**9, 10**9 + 1000))
    collection.attach_pointer_map("t_user", collection.pointer_map("t_user").with_vocabulary(known, unseen="error"))
    ids = torch.tensor([10**9, 5, 6])
    features = KeyedJaggedTensor(keys=["user"], values=ids, lengths=torch.ones(3, dtype=torch.int64))
    for each in (collection, other_way(collection)):
        with pytest.raises(InvalidIDError, match=r"'user': raw ID 5 \(position 1 of its 3.* among the 1000"):
            each(features)


@pytest.mark.usefixtures("_one_thread")
def test_any_number_of_threads_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    collection = CCEEmbeddingBagCollection(tables=tables())
    features = random_features(SIZES, 2000, 4, seed=0)
    found = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        collection.zero_grad()
        pooled = collection(features).values()
        pooled.square().sum().backward()
        found.append([pooled, *(weight.grad for weight in collection.parameters())])
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


def test_a_frozen_table_gets_no_gradient() -> None:
    collection = CCEEmbeddingBagCollection(tables=[cce(), full()])
    frozen, trained = (collection.ebc.embedding_bags[name].weight for name in ("t_day", "t_user"))
    frozen.requires_grad_(False)
    collection(random_features({"user": 1000, "day": 7}, 5, 2, seed=0)).values().sum().backward()
    assert frozen.grad is None
    assert trained.grad.any()


@pytest.mark.parametrize("batch_size", [0, 3])
def test_batches_without_ids(batch_size: int) -> None:
    collection = CCEEmbeddingBagCollection(tables=[cce(), full()])
    features = random_features({"user": 1000, "day": 7}, batch_size, 0, seed=0)
    pooled = collection(features).values()
    assert pooled.shape == (batch_size, 32)
    assert not pooled.any()
    pooled.sum().backward()
    assert not collection.ebc.embedding_bags["t_user"].weight.grad.any()


def test_copies_and_pickles_look_up_by_themselves() -> None:
    collection = CCEEmbeddingBagCollection(tables=tables())
    features = random_features(SIZES, 5, 2, seed=0)
    before = collection(features).values()
    for twin in (copy.deepcopy(collection), pickle.loads(pickle.dumps(collection))):
        assert torch.equal(twin(features).values(), before)
        with torch.no_grad():
            twin.ebc.embedding_bags["t_user"].weight.zero_()
        assert not twin(features)["user@t_user"].any()
        twin.recluster(seed=0)
    assert torch.equal(collection(features).values(), before)


def test_another_order_of_features() -> None:
    collection = CCEEmbeddingBagCollection(tables=tables())
    first = random_features(SIZES, 5, 2, seed=0)
    turned = first.permute([4, 2, 5, 0, 3, 1])
    assert is_packed(collection, turned)
    assert torch.equal(collection(first).values(), collection(turned).values())


def test_left_to_the_stock_collection() -> None:
    features = random_features({"user": 1000, "day": 7}, 5, 2, seed=0)
    signed = CompositionalEmbeddingBagConfig(
        name="t", num_embeddings=1000, embedding_dim=8, feature_names=["user"], num_rows=20, signed=True
    )
    assert not is_packed(CCEEmbeddingBagCollection(tables=[signed]), features)
    collection = CCEEmbeddingBagCollection(tables=[cce(), full()])
    assert is_packed(collection, features)
    assert not is_packed(collection, collection.remap(features))
    assert not is_packed(other_way(collection), features)
    assert not is_packed(copy.deepcopy(collection).double(), features)


@pytest.mark.parametrize("pooling", ["sum", "mean", "weighted"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_beside_residents(pooling: str, dtype: str) -> None:
    """Before a phase, while one is open, and after the fold; sums of residents beside means of others."""
    torch.manual_seed(0)
    kind, weighted = PoolingType.MEAN if pooling == "mean" else PoolingType.SUM, pooling == "weighted"
    other = PoolingType.SUM if weighted else PoolingType.MEAN
    collection = CCEEmbeddingBagCollection(
        tables=[
            cce(features=("user", "friend"), pooling=kind, residents=ResidentConfig(dtype=dtype, shrinkage=0)),
            cce("t_item", ("item",), num_embeddings=5000, num_columns=2, pooling=other),
            cce("t_narrow", use_helper=False, pooling=kind, residents=ResidentConfig(first_come=True)),
            full(pooling=kind),
        ],
        is_weighted=weighted,
    )
    features = random_features(SIZES, 12, 3, seed=0, weighted=weighted)
    for change in (lambda: None, lambda: collection.admit(seed=0), lambda: collection.recluster(seed=0)):
        change()
        assert_both_ways_equal(collection, features)
        assert_both_ways_equal(collection, random_features(SIZES, 0, 3, seed=0, weighted=weighted))
    collection.admit(seed=0)  # rows that learned
    half = copy.deepcopy(collection)
    half.codewords.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(half(features).values(), collection(features).values(), atol=1e-6, rtol=1e-6)
    assert not is_packed(half, features)
    features.values()[1] = 1000
    with pytest.raises(InvalidIDError, match="feature 'user': raw ID 1000"):
        collection(features)


def test_bags_that_are_none() -> None:
    collection = CCEEmbeddingBagCollection(tables=[cce()])
    for offsets in ([0, 5, 3], [0, 2, 2**40], [-3, 0, 2]):
        features = KeyedJaggedTensor(keys=["user"], values=torch.arange(4), offsets=torch.tensor(offsets))
        with pytest.raises(ConfigError, match="do not divide 4 IDs"):
            collection(features)


def test_a_bad_id_of_any_feature_is_named() -> None:
    collection = CCEEmbeddingBagCollection(tables=tables())
    features = random_features(SIZES, 5, 2, seed=0)
    at = features.offset_per_key()[2] + 1
    features.values()[at] = 5000
    with pytest.raises(InvalidIDError, match=r"'item': raw ID 5000 \(position 1 "):
        collection(features)


def test_operators_are_what_they_say() -> None:
    """Of the checks of PyTorch: schema, fake tensors, autograd."""
    collection = CCEEmbeddingBagCollection(tables=[cce(), full()])
    features = random_features({"user": 1000, "day": 7}, 5, 2, seed=0)
    collection(features)
    lookup = collection._packed["ebc"]._last
    offsets = features.offsets().long()
    arguments = features.values(), offsets, 5, lookup.number, lookup.num_words
    weights = [collection.ebc.embedding_bags[table].weight for table in lookup.shapes]
    words = torch.ops.torchrec_cce.pack(*arguments)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.torchrec_cce.pack, arguments, test_utils=checks)
    pooled = words, offsets, None, weights, 5, lookup.number, lookup.dim
    torch.library.opcheck(torch.ops.torchrec_cce.pool, pooled, test_utils=checks)


def test_weights_of_another_size_are_not_read_beyond_their_end() -> None:
    """Somebody has replaced a table by a smaller one: PyTorch looks up, and checks bounds."""
    torch.manual_seed(0)
    collection = CCEEmbeddingBagCollection([cce()])
    collection.ebc.embedding_bags["t_user"].weight = torch.nn.Parameter(torch.zeros(8, 4))
    with pytest.raises((IndexError, RuntimeError), match=r"(?i)index|out of"):
        collection(random_features({"user": 1000}, 50, 3, seed=0))
