"""The unpooled collection against a plain reference, a stock EmbeddingCollection, and the pooled collection."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec import EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, JaggedTensor, KeyedJaggedTensor
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from tests.support import method_references as references
from tests.support.module_cases import METHOD_SHAPES, random_features
from tests.support.module_cases import cce as pooled_cce
from torchrec_cce import (
    CCEEmbeddingBagCollection,
    CCEEmbeddingCollection,
    CCEEmbeddingConfig,
    CompositionalEmbeddingConfig,
    Registry,
)
from torchrec_cce.errors import ConfigError, InvalidIDError, MapMismatchError

KEYS = {"day": 7, "user": 1000, "unused": 5, "item": 50, "friend": 1000}


def cce(name: str = "t_user", features: tuple[str, ...] = ("user",), **changes: object) -> CCEEmbeddingConfig:
    arguments = {"num_embeddings": 1000, "embedding_dim": 16, "num_rows": 10, "num_columns": 4, **changes}
    return CCEEmbeddingConfig(name=name, feature_names=list(features), **arguments)


def full(name: str = "t_day", features: tuple[str, ...] = ("day",), **changes: object) -> EmbeddingConfig:
    arguments = {"num_embeddings": 7, "embedding_dim": 16, **changes}
    return EmbeddingConfig(name=name, feature_names=list(features), **arguments)


def hashed(**changes: object) -> CompositionalEmbeddingConfig:
    arguments = {"num_embeddings": 50, "embedding_dim": 16, "num_rows": 9, "num_columns": 4, "num_terms": 3, **changes}
    return CompositionalEmbeddingConfig(name="t_item", feature_names=["item"], **arguments)


def mixed() -> list[EmbeddingConfig]:
    """Widths 4, 8 and 16, and a table of two features."""
    return [cce(features=("user", "friend")), full(), cce("t_item", ("item",), num_embeddings=50, num_columns=2)]


def weight(collection: CCEEmbeddingCollection | CCEEmbeddingBagCollection, table: str = "t_user") -> torch.Tensor:
    return collection.get_parameter(collection.weight_name(table))


def assert_same(one: dict[str, JaggedTensor], other: dict[str, JaggedTensor]) -> None:
    assert one.keys() == other.keys()
    for name, sequence in one.items():
        assert torch.equal(sequence.values(), other[name].values())
        assert torch.equal(sequence.lengths(), other[name].lengths())
        ours, theirs = sequence.weights_or_none(), other[name].weights_or_none()
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def assert_equals_reference(collection: CCEEmbeddingCollection, features: KeyedJaggedTensor) -> None:
    weights = references.leaf_weights(collection)
    expected = references.sequences(collection, weights, features)
    got = collection(features)
    assert list(got) == list(expected)
    total, expected_total = torch.zeros(()), torch.zeros(())
    for name, values in expected.items():
        source = features[name.split("@")[0]]
        torch.testing.assert_close(got[name].values(), values, atol=1e-6, rtol=1e-6)
        assert torch.equal(got[name].lengths(), source.lengths())
        assert got[name].lengths().dtype == source.lengths().dtype
        along = source.values() if collection.need_indices() else source.weights_or_none()
        found = got[name].weights_or_none()
        assert found is None if along is None else torch.equal(found, along)
        cotangent = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
        expected_total = expected_total + (values * cotangent).sum()
        total = total + (got[name].values() * cotangent).sum()
    if not expected_total.requires_grad:  # all bags are empty
        return
    expected_total.backward()
    collection.zero_grad()
    total.backward()
    for name, leaf in weights.items():
        expected_gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        torch.testing.assert_close(weight(collection, name).grad, expected_gradient, atol=1e-6, rtol=1e-5)


@given(
    num_columns=st.sampled_from([1, 2, 4, 8, 16, 32]),
    num_rows=st.sampled_from([1, 2, 7, 300]),
    batch_size=st.integers(1, 4),
    max_length=st.integers(1, 3),
    clusterings=st.integers(0, 2),
    along=st.sampled_from(["weights", "raw IDs", "raw IDs, not weights", "nothing"]),
    use_helper=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_cce_equals_the_plain_reference(
    num_columns: int,
    num_rows: int,
    batch_size: int,
    max_length: int,
    clusterings: int,
    along: str,
    use_helper: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    collection = CCEEmbeddingCollection(
        tables=[
            cce(
                features=("user", "friend"),
                num_columns=num_columns,
                num_rows=num_rows,
                use_helper=use_helper,
                seed=seed,
                embedding_dim=32,
            ),
            full(embedding_dim=32),
            hashed(embedding_dim=32),
        ],
        need_indices="raw IDs" in along,
    )
    assert set(collection.ecs) == {str(32 // num_columns), "8", "32"}
    for step in range(clusterings):
        collection.recluster(seed=step)
    assert_equals_reference(
        collection, random_features(KEYS, batch_size, max_length, seed, weighted="weights" in along)
    )


@pytest.mark.parametrize("method", METHOD_SHAPES)
def test_hashed_methods_equal_the_plain_reference(method: str) -> None:
    num_columns, num_terms = METHOD_SHAPES[method]
    table = CompositionalEmbeddingConfig(
        name="t",
        num_embeddings=1000,
        embedding_dim=8,
        feature_names=["f"],
        num_rows=20,
        num_columns=num_columns,
        num_terms=num_terms,
    )
    assert_equals_reference(CCEEmbeddingCollection(tables=[table]), random_features({"f": 1000}, 20, 4, seed=1))


def test_physical_table() -> None:
    """Sizes, initialisation and errors are those of the pooled configuration."""
    config, pooled = (kind("t", ("f", "g"), num_rows=300) for kind in (cce, pooled_cce))
    physical = config.physical()
    assert type(physical) is EmbeddingConfig
    for name in ("name", "num_embeddings", "embedding_dim", "feature_names", "weight_init_min", "weight_init_max"):
        assert getattr(physical, name) == getattr(pooled.physical(), name)
    assert config.pointer_dtype == pooled.pointer_dtype == "u2"
    for changes, message in (({"num_columns": 5}, r"allowed: 1, 2, 4, 8, 16$"), ({"num_terms": 3}, "has 2, codebook")):
        with pytest.raises(ConfigError, match=message):
            cce(**changes)


@pytest.mark.parametrize("need_indices", [False, True])
def test_all_full_tables_are_a_stock_collection(need_indices: bool) -> None:
    tables = [full(), full("t_hour", ("hour", "day"), num_embeddings=24)]
    one = CCEEmbeddingCollection(tables=tables, need_indices=need_indices)
    stock = EmbeddingCollection(tables=tables, need_indices=need_indices)
    stock.load_state_dict(one.ecs["16"].state_dict())
    features = random_features({"hour": 24, "day": 7}, 6, 2, seed=0)
    assert_same(one(features), stock(features))
    for method in ("embedding_configs", "embedding_dim", "embedding_names_by_table", "need_indices"):
        assert getattr(one, method)() == getattr(stock, method)()
    assert one.device == stock.device


def test_empty_bags() -> None:
    collection = CCEEmbeddingCollection(tables=mixed(), need_indices=True)
    assert_equals_reference(collection, random_features(KEYS, 3, 0, seed=0))
    lengths = torch.tensor([0, 2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0])  # day, user, item, friend: 3 bags each
    features = KeyedJaggedTensor(
        keys=["day", "user", "item", "friend"], values=torch.tensor([3, 3, 9]), lengths=lengths
    )
    assert_equals_reference(collection, features)
    assert collection(features)["user"].values().shape == (0, 16)


def test_a_feature_on_two_tables_is_named_as_torchrec_names_it() -> None:
    tables = [
        cce("a", ("user",)),
        full("b", ("user",), num_embeddings=1000),
        cce("c", ("friend", "user"), num_columns=1),
        full("d", ("friend",), num_embeddings=1000),
    ]
    collection = CCEEmbeddingCollection(tables=tables, need_indices=True)
    assert collection.embedding_names_by_table() == [["user@a"], ["user@b"], ["friend@c", "user@c"], ["friend@d"]]
    assert_equals_reference(collection, random_features({"user": 1000, "friend": 1000}, 3, 2, seed=0))


def test_remap_in_the_data_loader_passes_through_the_model() -> None:
    collection = CCEEmbeddingCollection(tables=mixed())
    features = random_features(KEYS, 4, 3, seed=0)
    assert_same(collection(features), collection(collection.remap(features)))
    collection = CCEEmbeddingCollection(tables=mixed(), need_indices=True)
    with pytest.raises(ConfigError, match=r"need_indices: .*no raw IDs of \['friend', 'item', 'user'\]"):
        collection(collection.remap(features))


def test_variable_batch_per_feature() -> None:
    """As TorchRec's unsharded collection: sequences of the deduplicated batch. Sharded ones repeat them."""
    deduplicated = {
        "keys": ["user", "day"],
        "values": torch.tensor([1, 2, 3, 0]),
        "lengths": torch.tensor([1, 2, 1]),
        "stride_per_key_per_rank": [[2], [1]],
    }
    repeated = {"inverse_indices": (["user", "day"], torch.tensor([[0, 1, 0], [0, 0, 0]]))}
    collection = CCEEmbeddingCollection(tables=[cce(), full()], need_indices=True)
    assert_equals_reference(collection, KeyedJaggedTensor(**deduplicated))
    with pytest.raises(ConfigError, match="inverse_indices"):
        collection(KeyedJaggedTensor(**deduplicated, **repeated))
    collection = CCEEmbeddingCollection(tables=[cce(), full()])
    assert_equals_reference(collection, KeyedJaggedTensor(**deduplicated, **repeated))


def test_id_outside_the_universe_names_feature_value_and_range() -> None:
    features = KeyedJaggedTensor(keys=["user"], values=torch.tensor([5, 1000]), lengths=torch.tensor([2]))
    with pytest.raises(InvalidIDError, match=r"'user': raw ID 1000 \(position 1 .* 0\.\.999"):
        CCEEmbeddingCollection(tables=[cce()])(features)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([], r"one embedding_dim .*these have \{\}"),
        ([cce(), full(embedding_dim=8)], r"one embedding_dim .*\{'t_user': 16, 't_day': 8\}"),
        ([cce(), full("t_user")], "2 tables of the name 't_user'"),
        (
            [pooled_cce()],
            "'t_user' is described by a CCEEmbeddingBagConfig; CCEEmbeddingCollection takes EmbeddingConfig",
        ),
    ],
)
def test_tables_that_do_not_go_together(tables: list[EmbeddingConfig], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CCEEmbeddingCollection(tables=tables)


def test_the_pooled_collection_takes_no_unpooled_tables() -> None:
    for tables in ([cce()], [pooled_cce(), full()]):
        with pytest.raises(ConfigError, match=r"CCEEmbeddingBagCollection takes EmbeddingBagConfig"):
            CCEEmbeddingBagCollection(tables=tables)
    with pytest.raises(ConfigError, match="2 tables of the name 't'"):
        CCEEmbeddingBagCollection(tables=[EmbeddingBagConfig(name="t", num_embeddings=4, embedding_dim=4)] * 2)


def test_a_sequence_model_trains() -> None:
    torch.manual_seed(0)
    collection = CCEEmbeddingCollection(tables=mixed())
    output = torch.nn.Linear(4 * 4 * 16, 1)  # of 4 features, 4 positions each
    features = random_features(KEYS, 32, 4, seed=0)
    labels = (torch.rand(32, 1) > 0.5).float()
    optimizer = torch.optim.Adam([*collection.parameters(), *output.parameters()], lr=0.01)
    losses = []
    for step in range(20):
        padded = torch.cat([one.to_padded_dense(4) for one in collection(features).values()], dim=1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(output(padded.flatten(1)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step == 9:
            assert collection.recluster(seed=0, optimizer=optimizer).keys() == {"t_user", "t_item"}
    assert losses[-1] < losses[0] - 0.05


def test_meta_device_is_materialised_later() -> None:
    collection = CCEEmbeddingCollection(tables=mixed(), device=torch.device("meta"))
    assert collection.device.type == "meta"
    for refused in (lambda: collection.recluster(seed=0), collection.snapshot):
        with pytest.raises(ConfigError, match=r"t_user.*meta"):
            refused()
    collection.reset_parameters()
    assert collection.device.type == "meta"
    collection.to_empty(device="cpu")
    collection.reset_parameters()
    assert collection.device.type == "cpu"
    for table in ("t_user", "t_item"):
        assert 0.2 < weight(collection, table).abs().max() <= 0.25  # ±1/√16
    assert_equals_reference(collection, random_features(KEYS, 4, 3, seed=0))


def test_copies_and_pickles_compute_the_same() -> None:
    collection = CCEEmbeddingCollection(tables=mixed(), need_indices=True)
    collection.recluster(seed=0)
    features = random_features(KEYS, 4, 3, seed=0)
    expected = collection(features)
    duplicate = copy.deepcopy(collection)
    assert_same(duplicate(features), expected)
    assert_same(pickle.loads(pickle.dumps(collection))(features), expected)
    duplicate.recluster(seed=1)
    assert_same(collection(features), expected)


def test_state_dict_is_loaded_with_its_own_map_only() -> None:
    collection, other = (CCEEmbeddingCollection(tables=mixed()) for _ in range(2))
    other.load_state_dict(collection.state_dict())
    collection.recluster(seed=0)
    state, before = collection.state_dict(), {k: v.clone() for k, v in other.state_dict().items()}
    assert set(state) == {"remap._extra_state", *(collection.weight_name(t) for t in ("t_user", "t_day", "t_item"))}
    theirs, ours = collection.pointer_map("t_user"), other.pointer_map("t_user")
    with pytest.raises(
        MapMismatchError, match=rf"generation 1 .digest {theirs.digest[:12]}.*generation 0 .digest {ours.digest[:12]}"
    ):
        other.load_state_dict(state)
    for name, value in other.state_dict().items():
        assert torch.equal(value, before[name]), "nothing may be overwritten before the maps were compared"
    for table in collection.cce_tables():
        other.attach_pointer_map(table, collection.pointer_map(table))
    other.load_state_dict(state)
    features = random_features(KEYS, 4, 3, seed=0)
    assert_same(other(features), collection(features))


# The pooled collection is the same tables and maps.


def pair() -> tuple[CCEEmbeddingCollection, CCEEmbeddingBagCollection]:
    """An unpooled and a pooled collection of the same tables and weights."""
    unpooled = CCEEmbeddingCollection(tables=[cce(), cce("t_item", ("item",), num_embeddings=50, num_columns=2)])
    pooled = CCEEmbeddingBagCollection(
        tables=[pooled_cce(), pooled_cce("t_item", ("item",), num_embeddings=50, num_columns=2)]
    )
    with torch.no_grad():
        for table in ("t_user", "t_item"):
            weight(pooled, table).copy_(weight(unpooled, table))
    return unpooled, pooled


def bags_of_one(n: int = 50) -> KeyedJaggedTensor:
    ids = torch.arange(n)
    return KeyedJaggedTensor(keys=["user", "item"], values=ids.repeat(2), lengths=torch.ones(2 * n, dtype=torch.int64))


def test_clustering_is_that_of_a_pooled_collection_with_the_same_weights() -> None:
    unpooled, pooled = pair()
    optimizers = [RowWiseAdagrad(one.parameters(), lr=0.1) for one in (unpooled, pooled)]
    for step in range(3):
        for table in ("t_user", "t_item"):
            gradient = torch.randn(weight(unpooled, table).shape, generator=torch.Generator().manual_seed(step))
            for one in (unpooled, pooled):
                weight(one, table).grad = gradient
        for optimizer in optimizers:
            optimizer.step()
        reports = [
            one.recluster(seed=step, optimizer=optimizer)
            for one, optimizer in zip((unpooled, pooled), optimizers, strict=True)
        ]
        for table in ("t_user", "t_item"):
            assert torch.equal(weight(unpooled, table), weight(pooled, table))
            assert unpooled.pointer_map(table).digest == pooled.pointer_map(table).digest
            assert unpooled.pointer_map(table).generation == step + 1
            sums = [
                optimizer.state[weight(one, table)]["sum"]
                for one, optimizer in zip((unpooled, pooled), optimizers, strict=True)
            ]
            assert sums[0].any()
            assert torch.equal(*sums)
            assert reports[0][table].entropies == reports[1][table].entropies


@pytest.mark.parametrize("publisher", ["unpooled", "pooled"])
def test_published_and_attached_computes_the_same(publisher: str, tmp_path: Path) -> None:
    """A version is of tables and maps: which kind of collection trained it does not matter."""
    unpooled, pooled = pair()
    trained = unpooled if publisher == "unpooled" else pooled
    reports = trained.recluster(seed=0)
    registry = Registry(tmp_path / "registry", cache=tmp_path / "cache")
    registry.publish(trained.snapshot(reports))
    other, _ = pair()
    registry.open().attach(other)
    assert other.pointer_map("t_item").version == 1
    expected = pooled(bags_of_one()).to_dict() if publisher == "pooled" else unpooled(bags_of_one())
    for name, sequence in other(bags_of_one()).items():
        values = expected[name].values() if publisher == "unpooled" else expected[name]
        torch.testing.assert_close(sequence.values(), values, atol=0, rtol=0)
