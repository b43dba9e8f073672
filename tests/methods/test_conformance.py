"""One contract, every method: values and gradients of its definition, its cap kept, its state restored."""

import copy
import math
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, PoolingType

from tests.support import method_references as references
from torchrec_cce import (
    METHODS,
    CCEEmbeddingBagCollection,
    CCEEmbeddingBagConfig,
    CompositionalEmbeddingBagConfig,
    CompressedEmbeddingBag,
    DeepHashEmbeddingBagConfig,
    LowRankEmbeddingBagConfig,
    Method,
    QuotientRemainderEmbeddingBagConfig,
    RobeEmbeddingBagConfig,
    SketchEmbeddingBagConfig,
    TensorTrainEmbeddingBagConfig,
    tables_under_cap,
)
from torchrec_cce.errors import ConfigError, InvalidIDError

NUM_IDS, DIM, CAP = 60, 8, 300
POOLINGS = ("sum", "mean", "weighted")
VARIANTS = {
    "ce_hybrid with signs": CompositionalEmbeddingBagConfig(
        name="t", num_embeddings=NUM_IDS, embedding_dim=DIM, num_rows=5, num_columns=2, num_terms=2, signed=True
    ),
    "hash embeddings, all shared": SketchEmbeddingBagConfig(
        name="t",
        num_embeddings=NUM_IDS,
        embedding_dim=DIM,
        num_rows=9,
        num_terms=3,
        num_weight_rows=20,
        shares_words=True,
        shares_weights=True,
    ),
    "hash embeddings, columns": SketchEmbeddingBagConfig(
        name="t", num_embeddings=NUM_IDS, embedding_dim=DIM, num_rows=300, num_columns=4, num_terms=2, num_weight_rows=7
    ),
    "ce_concat, columns of one float": CompositionalEmbeddingBagConfig(
        name="t", num_embeddings=NUM_IDS, embedding_dim=DIM, num_rows=1, num_columns=8
    ),
}


def full(num_ids: int = NUM_IDS, dim: int = DIM) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(name="t", num_embeddings=num_ids, embedding_dim=dim, feature_names=["f"])


def compressed(method: Method, *, cap: int = CAP, pooling: str = "sum") -> EmbeddingBagConfig:
    (table,) = tables_under_cap([full()], method=method, max_parameters=cap)
    table.pooling = PoolingType.MEAN if pooling == "mean" else PoolingType.SUM
    return table


def bags(seed: int, num_bags: int = 7) -> tuple[list[list[int]], KeyedJaggedTensor]:
    """Bags of 0 to 3 IDs of two features, as lists and with weights as TorchRec has them."""
    rng = np.random.default_rng(seed)
    lists = [rng.integers(0, NUM_IDS, rng.integers(0, 4)).tolist() for _ in range(2 * num_bags)]
    values = torch.tensor([raw_id for bag in lists for raw_id in bag], dtype=torch.int64)
    features = KeyedJaggedTensor(
        keys=["f", "g"],
        values=values,
        lengths=torch.tensor([len(bag) for bag in lists]),
        weights=torch.from_numpy(rng.random(len(values), dtype=np.float32)),
    )
    return lists, features


def check_against_reference(table: EmbeddingBagConfig, pooling: str) -> None:
    """Beside a full table, which is pooled as it should be whatever its neighbour needs."""
    torch.manual_seed(0)
    table.feature_names = ["f", "g"]
    other = EmbeddingBagConfig(
        name="u", num_embeddings=NUM_IDS, embedding_dim=4, feature_names=["g"], pooling=table.pooling
    )
    weighted = pooling == "weighted"
    collection = CCEEmbeddingBagCollection([table, other], is_weighted=weighted)
    if isinstance(table, CCEEmbeddingBagConfig):
        collection.recluster(seed=0)
    lists, features = bags(seed=1)
    if not weighted:
        features = KeyedJaggedTensor(keys=features.keys(), values=features.values(), lengths=features.lengths())
    got = collection(features)
    assert got.keys() == ["f", "g@t", "g@u"]

    half = len(lists) // 2
    weights = list(features.weights().split([len(bag) for bag in lists])) if weighted else None
    expected = []
    leaves = {}
    for one, halves in ((table, (slice(half), slice(half, None))), (other, (slice(half, None),))):
        parameters = {
            name: value.detach().clone().requires_grad_()
            for name, value in references.parameters_of(collection, one).items()
        }
        leaves[one.name] = parameters
        expected += [
            references.pooled(collection, one, parameters, lists[part], weights[part] if weights else None)
            for part in halves
        ]
    wanted = torch.cat(expected, dim=1)
    torch.testing.assert_close(got.values(), wanted, atol=2e-6, rtol=2e-5)

    cotangent = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0))
    (wanted * cotangent).sum().backward()
    (got.values() * cotangent).sum().backward()
    for one in (table, other):
        for name, value in references.parameters_of(collection, one).items():
            gradient = leaves[one.name][name].grad
            assert gradient.abs().max() > 0
            torch.testing.assert_close(value.grad, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("method", METHODS)
class TestMethod:
    """What every method does."""

    def test_equals_its_definition(self, method: Method, pooling: str) -> None:
        table = compressed(method, cap=600 if method == "low_rank" else CAP, pooling=pooling)
        check_against_reference(table, pooling)

    def test_restores_its_state(self, method: Method, pooling: str) -> None:
        weighted = pooling == "weighted"
        table = compressed(method, pooling=pooling)
        table.feature_names = ["f"]
        one = CCEEmbeddingBagCollection([table], is_weighted=weighted)
        other = CCEEmbeddingBagCollection([table], is_weighted=weighted)
        for parameter in one.parameters():
            torch.nn.init.normal_(parameter)  # codewords of a table with residents are zero at first
        features = bags(seed=2)[1]
        expected = one(features).values()
        assert not torch.equal(other(features).values(), expected)
        assert other.load_state_dict(copy.deepcopy(one.state_dict())).missing_keys == []
        assert torch.equal(other(features).values(), expected)
        assert torch.equal(pickle.loads(pickle.dumps(one))(features).values(), expected)

    def test_bag_has_the_call_of_pytorch(self, method: Method, pooling: str) -> None:
        table = compressed(method, pooling=pooling)
        bag = CompressedEmbeddingBag(table)
        everyone = bag(torch.arange(NUM_IDS)[:, None]).detach()  # bags of one: [n, d], the table in full
        stock = torch.nn.EmbeddingBag(NUM_IDS, DIM, mode="mean" if pooling == "mean" else "sum", _weight=everyone)
        ids, offsets = torch.tensor([3, 1, 3, 59, 0]), torch.tensor([0, 2, 2, 4])
        weights = torch.rand(5, requires_grad=True) if pooling == "weighted" else None
        got = bag(ids, offsets, per_sample_weights=weights)
        torch.testing.assert_close(got, stock(ids, offsets, per_sample_weights=weights), atol=1e-6, rtol=1e-5)
        two = torch.tensor([[3, 1], [3, 59]], dtype=torch.int32)
        both = None if weights is None else weights[:4].view(2, 2)
        torch.testing.assert_close(
            bag(two, per_sample_weights=both), stock(two, per_sample_weights=both), atol=1e-6, rtol=1e-5
        )
        assert bag(torch.zeros(0, dtype=torch.int64), torch.tensor([0, 0])).tolist() == [[0.0] * DIM] * 2

    def test_materialised_from_the_meta_device(self, method: Method, pooling: str) -> None:
        table = compressed(method, pooling=pooling)
        table.feature_names = ["f"]
        collection = CCEEmbeddingBagCollection([table], is_weighted=pooling == "weighted", device=torch.device("meta"))
        collection.to_empty(device="cpu")
        for parameter in collection.parameters():
            torch.nn.init.constant_(parameter, math.nan)
        collection.reset_parameters()
        assert all(parameter.isfinite().all() for parameter in collection.parameters())
        assert collection(bags(seed=3)[1]).values().isfinite().all()

    def test_refuses_an_id_outside_its_universe(self, method: Method, pooling: str) -> None:
        bag = CompressedEmbeddingBag(compressed(method, pooling=pooling))
        for bad in (-1, NUM_IDS, 2**63 - 1, -(2**63)):
            with pytest.raises(InvalidIDError, match=rf"{bad}.*0\.\.{NUM_IDS - 1}"):
                bag(torch.tensor([[0], [bad]]))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_equal_their_definition(variant: str, pooling: str) -> None:
    table = copy.deepcopy(VARIANTS[variant])
    table.pooling = PoolingType.MEAN if pooling == "mean" else PoolingType.SUM
    check_against_reference(table, pooling)


@given(
    method=st.sampled_from([method for method in METHODS if method != "full"]),
    num_ids=st.integers(1, 10**7),
    dim=st.sampled_from([4, 8, 16, 64]),
    cap=st.integers(1, 10**6),
)
def test_no_method_exceeds_its_cap(method: Method, num_ids: int, dim: int, cap: int) -> None:
    """And if the cap is too little, the error names the least that is not."""
    try:
        (table,) = tables_under_cap([full(num_ids, dim)], method=method, max_parameters=cap)
    except ConfigError as error:
        least = int(re.search(r"at least (\d+) are needed", str(error))[1])
        assert least > cap
        (table,) = tables_under_cap([full(num_ids, dim)], method=method, max_parameters=least)
        assert num_ids * dim <= least or table.num_parameters <= least
        if num_ids * dim > least:
            with pytest.raises(ConfigError, match=rf"max_parameters={least - 1} is too little for {method}"):
                tables_under_cap([full(num_ids, dim)], method=method, max_parameters=least - 1)
        return
    if num_ids * dim <= cap:
        assert type(table) is EmbeddingBagConfig
    else:
        assert 0 < table.num_parameters <= cap


@pytest.mark.parametrize("method", [method for method in METHODS if method != "full"])
def test_parameters_are_those_that_are_counted(method: Method) -> None:
    table = compressed(method)
    collection = CCEEmbeddingBagCollection([table])
    held = sum(parameter.numel() for parameter in collection.parameters())
    rows = table.max_residents * DIM if isinstance(table, CCEEmbeddingBagConfig) else 0
    assert held == table.num_physical_parameters + rows
    assert sum(buffer.nbytes for buffer in collection.buffers()) == table.pointer_bytes
    # Each spends most of what it may.
    assert table.num_parameters > CAP * (0.4 if method in ("low_rank", "tensor_train", "dhe") else 0.9)


def test_dhe_has_the_sizes_of_the_paper() -> None:
    """With 64,000 parameters and 64 dimensions the root is 135.8; the paper rounds it to 136 and trains 64,192."""
    (table,) = tables_under_cap([full(10**6, 64)], method="dhe", max_parameters=64_000)
    assert isinstance(table, DeepHashEmbeddingBagConfig)
    assert table.width == 135
    assert DeepHashEmbeddingBagConfig(name="t", num_embeddings=1, embedding_dim=64, width=136).num_parameters == 64_192


def test_quotient_remainder_tells_all_ids_apart() -> None:
    (table,) = tables_under_cap([full()], method="qr_sum", max_parameters=200)
    assert isinstance(table, QuotientRemainderEmbeddingBagConfig)
    pairs = {(raw_id % table.num_rows, raw_id // table.num_rows) for raw_id in range(NUM_IDS)}
    assert len(pairs) == NUM_IDS


def test_signs_are_fair_and_independent_of_the_words() -> None:
    table = CompositionalEmbeddingBagConfig(name="t", num_embeddings=10_000, embedding_dim=4, num_rows=2, signed=True)
    collection = CCEEmbeddingBagCollection([table])
    with torch.no_grad():
        collection.ebc.embedding_bags["t"].weight.copy_(torch.tensor([[1.0] * 4, [2.0] * 4]))
    bag = torch.arange(10_000)
    features = KeyedJaggedTensor(keys=["t"], values=bag, lengths=torch.ones(10_000, dtype=torch.int64))
    values, counts = collection(features).values()[:, 0].unique(return_counts=True)
    assert values.tolist() == [-2.0, -1.0, 1.0, 2.0]
    assert (counts > 2_300).all()


def test_learned_pointers_are_taken_over() -> None:
    table = SketchEmbeddingBagConfig(
        name="t", num_embeddings=4, embedding_dim=4, num_rows=3, num_columns=2, num_terms=2, num_stored_terms=1
    )
    sketch = CCEEmbeddingBagCollection([table]).computed.tables["t"]
    pointers = np.array([[[0], [2]], [[1], [1]], [[2], [0]], [[0], [0]]])
    words = np.arange(12, dtype=np.float32).reshape(2, 1, 3, 2)
    with torch.no_grad():
        sketch.words.zero_()
    sketch.store(pointers, words)
    assert sketch.embed(torch.arange(4)).tolist() == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7], [0, 1, 6, 7]]
    with pytest.raises(ConfigError, match=r"pointers of shape \(4, 2\); this table has \(4, 2, 1\)"):
        sketch.store(pointers[:, :, 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RobeEmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=8, num_weights=99, block_size=3),
         r"block_size=3 does not divide embedding_dim=8; allowed: 1, 2, 4, 8"),
        (lambda: RobeEmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=8, num_weights=3, block_size=4),
         r"num_weights=3 is below block_size=4"),
        (lambda: LowRankEmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=8, rank=9),
         r"rank=9 is not in 1\.\.8"),
        (lambda: DeepHashEmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=8, width=0),
         r"width=0 must be at least 1"),
        (lambda: SketchEmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=8, num_rows=4, num_columns=3),
         r"num_columns=3 does not divide embedding_dim=8 .*; allowed: 1, 2, 4, 8"),
        (lambda: SketchEmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=8, num_rows=4, num_stored_terms=2),
         r"num_stored_terms=2 is not in 0\.\.1"),
        (lambda: QuotientRemainderEmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=7, num_rows=4,
                                                     operation="concat"),
         r"num_columns=2 does not divide embedding_dim=7"),
        (lambda: QuotientRemainderEmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=8, num_rows=4,
                                                     operation="multiply"),
         r"operation='multiply' is not one of"),
        (lambda: CCEEmbeddingBagConfig(name="t", num_embeddings=9, embedding_dim=8, num_rows=4, signed=True),
         r"signed=True is for CompositionalEmbeddingBagConfig"),
    ],
)  # fmt: skip
def test_config_errors_name_what_is_allowed(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda bag: bag(torch.tensor([1, 2])), r"input of shape \(2,\) with no offsets"),
        (lambda bag: bag(torch.tensor([[1, 2]]), torch.tensor([0])), r"input of shape \(1, 2\) with offsets"),
        (lambda bag: bag(torch.tensor([1, 2]), torch.tensor([1, 2])), r"offsets=\[1, 2\]"),
        (lambda bag: bag(torch.tensor([1, 2]), torch.tensor([0, 2, 1])), r"offsets=\[0, 2, 1\]"),
        (lambda bag: bag(torch.tensor([[1, 2]]), per_sample_weights=torch.ones(2)), r"per_sample_weights of shape"),
    ],
)
def test_calls_that_do_not_go_together(call: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(CompressedEmbeddingBag(compressed("ce_concat")))


@pytest.mark.parametrize("num_ids", [1, 2, 7, 64, 65, 1001])
def test_tensor_train_tells_all_ids_apart(num_ids: int) -> None:
    table = TensorTrainEmbeddingBagConfig(name="t", num_embeddings=num_ids, embedding_dim=18, rank=1)
    n0, n1, n2 = table.row_factors
    digits = {(i // (n1 * n2), i // n2 % n1, i % n2) for i in range(num_ids)}
    assert len(digits) == num_ids
    assert all(a < n0 and b < n1 and c < n2 for a, b, c in digits)
    assert sorted(table.column_factors) == [2, 3, 3]
