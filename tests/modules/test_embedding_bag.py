"""The collection against a plain reference, and everything a user of TorchRec does with an EmbeddingBagCollection."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
from torchrec.models.dlrm import DLRM

from tests.support import method_references as references
from tests.support.module_cases import METHOD_SHAPES, assert_equals_reference, cce, full, random_features
from torchrec_cce import (
    METHODS,
    CCEEmbeddingBagCollection,
    CompositionalEmbeddingBagConfig,
    tables_under_cap,
)
from torchrec_cce.errors import ConfigError, InvalidIDError, MapMismatchError


@given(
    num_columns=st.sampled_from([1, 2, 4, 8, 16, 32]),
    num_rows=st.sampled_from([1, 2, 7, 300]),
    pooling=st.sampled_from(["sum", "mean", "weighted"]),
    batch_size=st.integers(1, 5),
    max_length=st.integers(0, 4),
    clusterings=st.integers(0, 2),
    use_helper=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_cce_equals_the_plain_reference(
    num_columns: int,
    num_rows: int,
    pooling: str,
    batch_size: int,
    max_length: int,
    clusterings: int,
    use_helper: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    kind = PoolingType.MEAN if pooling == "mean" else PoolingType.SUM
    sizes = {"embedding_dim": 32, "pooling": kind}
    collection = CCEEmbeddingBagCollection(
        tables=[
            cce(
                features=("user", "friend"),
                num_columns=num_columns,
                num_rows=num_rows,
                use_helper=use_helper,
                seed=seed,
                **sizes,
            ),
            full(**sizes),
        ],
        is_weighted=pooling == "weighted",
    )
    for step in range(clusterings):
        collection.recluster(seed=step)
    features = random_features(
        {"day": 7, "user": 1000, "unused": 5, "friend": 1000},
        batch_size,
        max_length,
        seed,
        weighted=pooling == "weighted",
    )
    assert_equals_reference(collection, features)


@pytest.mark.parametrize("method", METHOD_SHAPES)
@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN])
def test_hashed_methods_equal_the_plain_reference(method: str, pooling: PoolingType) -> None:
    num_columns, num_terms = METHOD_SHAPES[method]
    table = CompositionalEmbeddingBagConfig(
        name="t",
        num_embeddings=1000,
        embedding_dim=8,
        feature_names=["f"],
        num_rows=20,
        num_columns=num_columns,
        num_terms=num_terms,
        pooling=pooling,
    )
    assert_equals_reference(CCEEmbeddingBagCollection(tables=[table]), random_features({"f": 1000}, 20, 4, seed=1))


def test_gradient_reaches_the_sample_weights() -> None:
    collection = CCEEmbeddingBagCollection(tables=[cce()], is_weighted=True)
    features = random_features({"user": 1000}, 5, 3, seed=2, weighted=True)
    features._weights.requires_grad_()
    collection(features).values().sum().backward()
    got, features._weights.grad = features._weights.grad, None
    references.forward(collection, references.leaf_weights(collection), features).sum().backward()
    torch.testing.assert_close(got, features._weights.grad, atol=1e-6, rtol=1e-5)


def test_cce_starts_as_ce_hybrid() -> None:
    torch.manual_seed(0)
    hybrid = CompositionalEmbeddingBagConfig(
        name="t_user",
        num_embeddings=1000,
        embedding_dim=16,
        feature_names=["user"],
        num_rows=10,
        num_columns=4,
        num_terms=2,
    )
    one, other = CCEEmbeddingBagCollection(tables=[cce()]), CCEEmbeddingBagCollection(tables=[hybrid])
    other.ebc.load_state_dict(one.ebc.state_dict())
    features = random_features({"user": 1000}, 8, 3, seed=0)
    assert torch.equal(one(features).values(), other(features).values())


def test_all_full_tables_are_a_stock_collection() -> None:
    tables = [full(), full("t_hour", ("hour",), num_embeddings=24)]
    one, stock = CCEEmbeddingBagCollection(tables=tables), EmbeddingBagCollection(tables=copy.deepcopy(tables))
    stock.load_state_dict(one.ebc.state_dict())
    features = random_features({"hour": 24, "day": 7}, 6, 2, seed=0)
    assert torch.equal(one(features).values(), stock(features).values())
    assert one(features).keys() == stock(features).keys()


def test_a_feature_on_two_tables_is_named_as_torchrec_names_it() -> None:
    tables = [cce("a", ("user",)), cce("b", ("user", "friend"))]
    output = CCEEmbeddingBagCollection(tables=tables)(random_features({"user": 1000, "friend": 1000}, 3, 2, seed=0))
    assert output.keys() == ["user@a", "user@b", "friend"]
    assert output.length_per_key() == [16, 16, 16]


@pytest.mark.parametrize("clustered", [False, True])
def test_variable_batch_per_feature(clustered: bool) -> None:
    collection = CCEEmbeddingBagCollection(tables=[cce(), cce("t_item", ("item",)), full()])
    if clustered:
        collection.recluster(seed=0)
    deduplicated = KeyedJaggedTensor(
        keys=["user", "item", "day"],
        values=torch.tensor([1, 2, 3, 4, 5, 6, 0]),
        lengths=torch.tensor([1, 1, 1, 1, 2, 1]),
        stride_per_key_per_rank=[[2], [3], [1]],
        inverse_indices=(
            ["user", "item", "day"],
            torch.tensor([[0, 1, 0, 1], [2, 1, 0, 0], [0, 0, 0, 0]]),
        ),
    )
    expanded = KeyedJaggedTensor(
        keys=["user", "item", "day"],
        values=torch.tensor([1, 2, 1, 2, 5, 6, 4, 3, 3, 0, 0, 0, 0]),
        lengths=torch.tensor([1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1]),
    )
    torch.testing.assert_close(collection(deduplicated).values(), collection(expanded).values(), atol=0, rtol=0)


def test_remap_in_the_data_loader_passes_through_the_model() -> None:
    collection = CCEEmbeddingBagCollection(tables=[cce(), full()])
    features = random_features({"user": 1000, "day": 7}, 4, 3, seed=0)
    assert torch.equal(collection(features).values(), collection(collection.remap(features)).values())


def test_int32_ids() -> None:
    collection = CCEEmbeddingBagCollection(tables=[cce()])
    wide = random_features({"user": 1000}, 4, 3, seed=0)
    narrow = KeyedJaggedTensor(keys=["user"], values=wide.values().to(torch.int32), lengths=wide.lengths())
    assert torch.equal(collection(narrow).values(), collection(wide).values())


@pytest.mark.parametrize("table", [cce(), cce(num_rows=1000), full("t_user", ("user",), num_embeddings=1000)])
@pytest.mark.parametrize("bad_id", [-1, 1000, 2**40, -(2**63)])
def test_id_outside_the_universe_names_feature_value_and_range(table: EmbeddingBagConfig, bad_id: int) -> None:
    collection = CCEEmbeddingBagCollection(tables=[table])
    features = KeyedJaggedTensor(keys=["user"], values=torch.tensor([5, bad_id]), lengths=torch.tensor([1, 1]))
    with pytest.raises(InvalidIDError, match=rf"'user': raw ID {bad_id} \(position 1 .* 0\.\.999"):
        collection(features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int16, torch.bool])
def test_ids_of_another_dtype(dtype: torch.dtype) -> None:
    features = KeyedJaggedTensor(keys=["user"], values=torch.ones(2, dtype=dtype), lengths=torch.tensor([1, 1]))
    with pytest.raises(InvalidIDError, match=rf"'user'.*{dtype}.*int64 or int32"):
        CCEEmbeddingBagCollection(tables=[cce()])(features)


def test_missing_feature() -> None:
    with pytest.raises(ConfigError, match=r"\['day'\].*\['user'\]"):
        CCEEmbeddingBagCollection(tables=[cce(), full()])(random_features({"user": 1000}, 2, 1, seed=0))


def test_weighted_mean_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"t_user.*weighted"):
        CCEEmbeddingBagCollection(tables=[cce(pooling=PoolingType.MEAN)], is_weighted=True)


@pytest.mark.parametrize("method", METHODS)
def test_dlrm_takes_it_unchanged_and_trains(method: str) -> None:
    torch.manual_seed(0)
    tables = tables_under_cap(
        [full("t_user", ("user",), num_embeddings=1000), full()], method=method, max_parameters=1100
    )
    model = DLRM(
        CCEEmbeddingBagCollection(tables=tables),
        dense_in_features=3,
        dense_arch_layer_sizes=[8, 16],
        over_arch_layer_sizes=[8, 1],
    )
    features = random_features({"user": 1000, "day": 7}, 32, 2, seed=0)
    dense, labels = torch.rand(32, 3), (torch.rand(32, 1) > 0.5).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(dense, features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


def test_meta_device_is_materialised_later() -> None:
    collection = CCEEmbeddingBagCollection(tables=[cce(), full()], device=torch.device("meta"))
    assert collection.device.type == "meta"
    with pytest.raises(ConfigError, match=r"t_user.*meta"):
        collection.recluster(seed=0)
    collection.to_empty(device="cpu")
    collection.reset_parameters()
    assert collection.device.type == "cpu"
    weight = collection.ebc.embedding_bags["t_user"].weight
    assert 0.2 < weight.abs().max() <= 0.25  # ±1/√16
    assert_equals_reference(collection, random_features({"user": 1000, "day": 7}, 4, 3, seed=0))


def test_copies_and_pickles_compute_the_same() -> None:
    collection = CCEEmbeddingBagCollection(tables=[cce(), full()])
    collection.recluster(seed=0)
    features = random_features({"user": 1000, "day": 7}, 4, 3, seed=0)
    expected = collection(features).values()
    duplicate = copy.deepcopy(collection)
    assert torch.equal(duplicate(features).values(), expected)
    assert torch.equal(pickle.loads(pickle.dumps(collection))(features).values(), expected)
    duplicate.recluster(seed=1)
    assert torch.equal(collection(features).values(), expected)


def test_maps_are_no_part_of_parameters_or_buffers() -> None:
    collection = CCEEmbeddingBagCollection(tables=[cce(num_embeddings=100_000)])
    collection.recluster(seed=0)
    assert collection.pointer_map("t_user").nbytes == 400_000
    assert sum(p.numel() for p in collection.parameters()) == 2 * 10 * 16
    assert not list(collection.buffers())
    saved = io.BytesIO()
    torch.save(collection.state_dict(), saved)
    assert saved.tell() < 10_000


def test_state_dict_is_loaded_with_its_own_map_only() -> None:
    collection, other = (CCEEmbeddingBagCollection(tables=[cce(), full()]) for _ in range(2))
    other.load_state_dict(collection.state_dict())
    collection.recluster(seed=0)
    state, before = collection.state_dict(), {k: v.clone() for k, v in other.state_dict().items()}
    theirs, ours = collection.pointer_map("t_user"), other.pointer_map("t_user")
    with pytest.raises(
        MapMismatchError, match=rf"generation 1 .digest {theirs.digest[:12]}.*generation 0 .digest {ours.digest[:12]}"
    ):
        other.load_state_dict(state)
    for name, value in other.state_dict().items():
        assert torch.equal(value, before[name]), "nothing may be overwritten before the maps were compared"
    other.attach_pointer_map("t_user", collection.pointer_map("t_user"))
    other.load_state_dict(state)
    features = random_features({"user": 1000, "day": 7}, 4, 3, seed=0)
    assert torch.equal(other(features).values(), collection(features).values())


def test_attach_checks_sizes_and_table() -> None:
    collection = CCEEmbeddingBagCollection(tables=[cce(), full()])
    small = CCEEmbeddingBagCollection(tables=[cce(num_embeddings=10)]).pointer_map("t_user")
    with pytest.raises(MapMismatchError, match="1000 IDs"):
        collection.attach_pointer_map("t_user", small)
    with pytest.raises(ConfigError, match=r"'t_day' is not a CCE table; those are: t_user"):
        collection.attach_pointer_map("t_day", small)
