"""Reclustering a collection: what changes, what must not, and what happens to the optimizer."""

import copy

import numpy as np
import pytest
import torch
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.modules.embedding_configs import DataType
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.optim.warmup import WarmupOptimizer

from torchrec_cce import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig, ReclusterConfig
from torchrec_cce.errors import ClusteringError, ConfigError

N, C, K, D = 600, 4, 10, 16


def collection(*names: str, **changes: object) -> CCEEmbeddingBagCollection:
    torch.manual_seed(0)
    sizes = {"num_embeddings": N, "embedding_dim": D, "num_rows": K, "num_columns": C, **changes}
    tables = [CCEEmbeddingBagConfig(name=name, feature_names=[f"f_{name}"], **sizes) for name in names or ("t",)]
    return CCEEmbeddingBagCollection(tables=tables)


def weight(one: CCEEmbeddingBagCollection, table: str = "t") -> torch.nn.Parameter:
    return one.ebc.embedding_bags[table].weight


def embeddings(one: CCEEmbeddingBagCollection, table: str = "t") -> torch.Tensor:
    """[N, D]: of all IDs."""
    every = KeyedJaggedTensor(keys=[f"f_{table}"], values=torch.arange(N), lengths=torch.ones(N, dtype=torch.int32))
    return one(every).values().detach()


def train(one: CCEEmbeddingBagCollection, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        target = torch.randn(N, D, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        every = KeyedJaggedTensor(keys=["f_t"], values=torch.arange(N), lengths=torch.ones(N, dtype=torch.int32))
        ((one(every).values() - target) ** 2).sum().backward()
        optimizer.step()


def test_every_id_moves_to_its_nearest_codeword_and_the_helper_is_zero() -> None:
    one = collection()
    before = embeddings(one)
    report = one.recluster(seed=1)["t"]
    codebooks, helpers = weight(one).detach().view(C, 2, K, D // C).unbind(1)
    assert not helpers.any()
    after, pointers = embeddings(one), one.pointer_map("t").stored_view
    distances = 0.0
    for j in range(C):
        column = before[:, j * D // C : (j + 1) * D // C]
        squared = ((column[:, None] - codebooks[j]) ** 2).sum(-1)
        chosen = torch.from_numpy(pointers[:, j].astype(np.int64))
        torch.testing.assert_close(squared.gather(1, chosen[:, None])[:, 0], squared.min(dim=1).values)
        torch.testing.assert_close(after[:, j * D // C : (j + 1) * D // C], codebooks[j][chosen])
        distances += float(squared.min(dim=1).values.mean())
    assert report.objective == pytest.approx(distances, rel=1e-5)
    assert float(((after - before) ** 2).sum(1).mean()) == pytest.approx(distances, rel=1e-5)


def test_without_helper() -> None:
    """Its rows are zeros from the start, after a clustering and after a version with helper; nothing reads them."""

    def helper(one: CCEEmbeddingBagCollection) -> torch.Tensor:
        return weight(one).detach().view(C, 2, K, -1)[:, 1]

    one, other = collection(use_helper=False), collection()
    assert weight(one).shape == weight(other).shape
    assert not helper(one).any()
    codebooks = weight(other).detach().view(C, 2, K, -1)[:, 0]
    assert torch.equal(weight(one).detach().view(C, 2, K, -1)[:, 0], codebooks), "drawn as with a helper"
    before = embeddings(one)
    with torch.no_grad():  # as TorchRec leaves shards, which it initialises without asking which rows they are
        helper(one).fill_(3.0)
    assert torch.equal(embeddings(one), before)
    assert not one.snapshot()["t"].weights.reshape(C, 2, -1)[:, 1].any()  # type: ignore[union-attr]
    same = collection(use_helper=False)
    assert one.recluster(seed=1)["t"].objective == same.recluster(seed=1)["t"].objective
    assert torch.equal(weight(one), weight(same))
    assert not helper(one).any()

    other.recluster(seed=1, settings=ReclusterConfig(helper_init="residual"))
    assert helper(other).any()
    one.restore(other.snapshot())
    assert one.pointer_map("t").digest == other.pointer_map("t").digest
    assert not helper(one).any()
    with torch.no_grad():
        helper(other).zero_()
    assert torch.equal(embeddings(one), embeddings(other))
    with pytest.raises(ConfigError, match=r"table 't': helper_init=\"residual\" needs the helper, which is not used"):
        one.recluster(seed=2, settings=ReclusterConfig(helper_init="residual"))


def test_report() -> None:
    one = collection("a", "b")
    reports = one.recluster(seed=1)
    assert list(reports) == ["a", "b"]
    for name, report in reports.items():
        assert report.generation == one.pointer_map(name).generation == 1
        assert len(report.entropies) == C
        assert 0 < report.entropies[0] <= report.entropies[-1] <= np.log(N) + 1e-6
        assert 0.5 < report.share_changed <= 1
        assert report.objective > 0
        assert report.seconds > 0


def test_pointers_get_the_width_that_k_needs() -> None:
    for num_rows, dtype in ((256, np.uint8), (257, np.uint16)):
        one = collection(num_rows=num_rows, num_columns=1)
        one.recluster(seed=0)
        assert one.pointer_map("t").stored_view.dtype == dtype


def test_residual_helper_comes_closer_than_zero() -> None:
    before = embeddings(collection())
    errors = {}
    for helper_init in ("zero", "residual"):
        one = collection()
        one.recluster(seed=1, settings=ReclusterConfig(helper_init=helper_init))
        errors[helper_init] = float(((embeddings(one) - before) ** 2).sum())
    assert errors["residual"] < errors["zero"]


def test_equal_states_and_seeds_give_equal_bits_and_no_seed_is_used_twice() -> None:
    one, same, other = collection("a", "b"), collection("a", "b"), collection("a", "b")
    for each, seed in ((one, 1), (same, 1), (other, 2)):
        each.recluster(seed=seed)
    assert one.pointer_map("a").digest == same.pointer_map("a").digest
    assert torch.equal(weight(one, "a"), weight(same, "a"))
    assert one.pointer_map("a").digest != other.pointer_map("a").digest
    # Two tables of equal weights, and one table at two versions, still start k-means differently.
    with torch.no_grad():
        weight(one, "b").copy_(weight(one, "a"))
    helpers = {one.pointer_map(name).helper_hash.multipliers.tobytes() for name in ("a", "b")}
    one.recluster(seed=1)
    helpers |= {one.pointer_map(name).helper_hash.multipliers.tobytes() for name in ("a", "b")}
    assert len(helpers) == 4


@pytest.mark.parametrize(
    ("kind", "arguments", "state_names"),
    [
        (torch.optim.Adam, {"lr": 0.01}, ["exp_avg", "exp_avg_sq"]),
        (torch.optim.Adagrad, {"lr": 0.1}, ["sum"]),
        (RowWiseAdagrad, {"lr": 0.1}, ["sum"]),
        (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}, ["momentum_buffer"]),
        (torch.optim.SGD, {"lr": 0.01}, []),
    ],
)
@pytest.mark.parametrize("use_helper", [True, False])
def test_optimizer_state_follows_the_members(
    kind: type[torch.optim.Optimizer], arguments: dict[str, float], state_names: list[str], use_helper: bool
) -> None:
    """A codebook row gets the mean, over the IDs that now share it, of the mean state of their old rows, two or one."""
    one = collection(use_helper=use_helper)
    optimizer = kind(one.parameters(), **arguments)
    train(one, optimizer)
    old = copy.deepcopy(dict(optimizer.state.get(weight(one), {})))
    old_codes = one.pointer_map("t").codes(np.arange(N))
    one.recluster(seed=0, optimizer=optimizer)
    new = optimizer.state.get(weight(one), {})
    pointers = one.pointer_map("t").stored_view
    for name in state_names:
        before = old[name].view(C, 2, K, -1)
        after = new[name].view(C, 2, K, -1)
        assert not after[:, 1].any(), "fresh moments for the helper"
        for j in range(C):
            of_id = before[j, 0][old_codes[j, 0]]
            if use_helper:
                of_id = (of_id + before[j, 1][old_codes[j, 1]]) / 2
            for row in range(K):
                members = of_id[pointers[:, j] == row]
                expected = members.mean(0) if len(members) else torch.zeros_like(of_id[0])
                torch.testing.assert_close(after[j, 0, row], expected, rtol=1e-5, atol=1e-7)
    if "step" in old:
        assert torch.equal(torch.as_tensor(old["step"]), torch.as_tensor(new["step"]))
    before_step = embeddings(one)
    train(one, optimizer, steps=1)
    assert torch.isfinite(embeddings(one)).all()
    assert not torch.equal(embeddings(one), before_step)


def test_the_state_of_an_optimizer_that_torchrecs_wrap() -> None:
    """A wrapper holds on to the state that a combined optimizer had before its first step: none."""
    found = []
    for wrap in (lambda each: each, lambda each: WarmupOptimizer(CombinedOptimizer([("t", each)]), [], lr=0.01)):
        torch.manual_seed(0)
        one = collection()
        adam = KeyedOptimizerWrapper(dict(one.named_parameters()), lambda each: torch.optim.Adam(each, lr=0.01))
        optimizer = wrap(adam)
        train(one, optimizer)
        one.recluster(seed=0, optimizer=optimizer)
        found.append(adam.state[weight(one)]["exp_avg"])
    assert found[0].any()
    assert torch.equal(*found)


def test_without_an_optimizer_its_state_stays() -> None:
    one = collection()
    optimizer = torch.optim.Adam(one.parameters())
    train(one, optimizer)
    before = optimizer.state[weight(one)]["exp_avg"].clone()
    one.recluster(seed=0)
    assert torch.equal(optimizer.state[weight(one)]["exp_avg"], before)


def test_ids_that_never_occurred_do_not_move_centroids() -> None:
    one, other = collection(), collection()
    seen = np.zeros(N, np.int64)
    seen[:K] = 1 + np.arange(K)
    one.recluster(seed=0, frequencies={"t": seen})
    # As many distinct embeddings as codewords: each is met exactly.
    torch.testing.assert_close(embeddings(one)[:K], embeddings(other)[:K], atol=1e-6, rtol=0)
    other.recluster(seed=0)
    assert one.pointer_map("t").digest != other.pointer_map("t").digest


def test_half_precision_tables() -> None:
    one = collection(data_type=DataType.FP16)
    one.recluster(seed=0)
    assert weight(one).dtype == torch.float16
    assert torch.isfinite(embeddings(one)).all()


def test_a_collection_without_cce_tables() -> None:
    full = EmbeddingBagConfig(name="t", num_embeddings=5, embedding_dim=4, feature_names=["f"])
    assert CCEEmbeddingBagCollection(tables=[full]).recluster(seed=0) == {}


def test_an_error_in_one_table_leaves_all_as_they_were() -> None:
    one = collection("a", "b")
    with torch.no_grad():
        weight(one, "b")[13, 2] = float("nan")
    before = {name: value.clone() for name, value in one.state_dict().items()}
    maps = [one.pointer_map(name) for name in ("a", "b")]
    with pytest.raises(ClusteringError, match="table 'b': 1 of 320 values of weights are NaN"):
        one.recluster(seed=0)
    assert [one.pointer_map(name) for name in ("a", "b")] == maps
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, before[name], equal_nan=True, rtol=0, atol=0)


def test_misuse_is_named() -> None:
    one = collection()
    with pytest.raises(ConfigError, match=r"\['x'\]"):
        one.recluster(seed=0, frequencies={"x": np.ones(N)})
    with pytest.raises(ConfigError, match=r"table 't': .*\[599\], not \[600\]"):
        one.recluster(seed=0, frequencies={"t": np.ones(N - 1)})
    with pytest.raises(ConfigError, match="does not hold the weights of table 't'"):
        one.recluster(seed=0, optimizer=torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))]))
