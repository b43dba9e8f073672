"""A collection with residents: lookups against a plain sum, phases, what is frozen, and what is refused."""

import copy

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from tests.support.module_cases import random_features
from torchrec_cce import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig, ReclusterConfig
from torchrec_cce.errors import ClusteringError, ConfigError, GradientError
from torchrec_cce.kernels.slots import NEVER
from torchrec_cce.maps.residency import Residency
from torchrec_cce.maps.vocabulary import Vocabulary
from torchrec_cce.methods.residents import ResidentConfig
from torchrec_cce.modules.quantized_rows import QuantizedTable

N, D, C, K = 200, 8, 4, 5
KEYS = {"day": 7, "b": N, "a": N}
DTYPES = ("float32", "float16", "int8")
ROUNDINGS = {"float32": 0.0, "float16": 2.0**-11}
"""The largest error of a number near 1 that is stored as the nearest."""


def collection(
    dtype: str = "float32", *, is_weighted: bool = False, fraction: float = 0.3, device: str = "cpu", **changes: object
) -> CCEEmbeddingBagCollection:
    torch.manual_seed(0)
    residents = ResidentConfig(fraction=fraction, dtype=dtype, learning_rate=0.1)
    sizes = {"num_embeddings": N, "embedding_dim": D, "num_columns": C, "num_rows": K, "residents": residents}
    tables = [
        CCEEmbeddingBagConfig(name="t", feature_names=["a", "b"], **sizes | changes),
        EmbeddingBagConfig(name="d", num_embeddings=7, embedding_dim=D, feature_names=["day"]),
    ]
    return CCEEmbeddingBagCollection(tables=tables, is_weighted=is_weighted, device=torch.device(device))


def learned(dtype: str = "float32", **changes: object) -> CCEEmbeddingBagCollection:
    """In an open phase, with codewords and rows that are not zero."""
    one = collection(dtype, **changes)
    torch.nn.init.normal_(one.codewords.embedding_bags["t"].weight)
    one.admit(seed=1)
    set_rows(one, dtype)
    return one


def set_rows(one: CCEEmbeddingBagCollection, dtype: str) -> None:
    rows = torch.randn(one.cce_configs()[0].max_residents, D)
    if dtype != "float32":
        table = rows_table(one)
        table.rows.copy_((rows / float(table.step)).clamp(-127, 127))
    else:
        with torch.no_grad():
            one.residents.embedding_bags["t_residents"].weight.copy_(rows)


def rows_of(one: CCEEmbeddingBagCollection) -> torch.Tensor:
    if one.quantized_residents is None:
        return one.residents.embedding_bags["t_residents"].weight.detach()
    table = rows_table(one)
    return table.rows.float() * float(table.step)


def rows_table(one: CCEEmbeddingBagCollection) -> QuantizedTable:
    return one.quantized_residents.tables["t_residents"]


def embeddings(one: CCEEmbeddingBagCollection, *, with_rows: bool = True) -> torch.Tensor:
    """[N, D] of all IDs, by a plain sum."""
    codes = torch.from_numpy(one.pointer_map("t").codebook_codes(np.arange(N)).astype(np.int64))
    codebook = one.codewords.embedding_bags["t"].weight.detach().view(C, 2, K, D // C)[:, 0]
    whole = torch.cat([codebook[j][codes[:, j]] for j in range(C)], dim=1)
    residency = one.remap.residency("t")
    if with_rows and residency.is_open:
        residents = np.flatnonzero(residency.ages == 0)
        whole[residents] += rows_of(one)[residency.slots.of(residents)]
    return whole


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("pooling", "is_weighted"), [("sum", False), ("mean", False), ("sum", True)])
def test_an_embedding_is_that_of_the_codewords_and_the_row(dtype: str, pooling: str, is_weighted: bool) -> None:
    one = learned(dtype, pooling=PoolingType[pooling.upper()], is_weighted=is_weighted)
    features = random_features(KEYS, batch_size=12, max_length=4, seed=0, weighted=is_weighted)
    found, each = one(features), embeddings(one)
    for key in ("a", "b"):
        bags = features[key]
        weights = bags.weights() if is_weighted else torch.ones(len(bags.values()))
        for bag, (start, stop) in enumerate(zip(bags.offsets()[:-1], bags.offsets()[1:], strict=True)):
            part = slice(int(start) - int(bags.offsets()[0]), int(stop) - int(bags.offsets()[0]))
            expected = (weights[part, None] * each[bags.values()[part]]).sum(0)
            if pooling == "mean":
                expected = expected / max(1, part.stop - part.start)
            torch.testing.assert_close(found[key][bag], expected, atol=1e-5, rtol=1e-5)
    assert found.keys() == ["a", "b", "day"]


def test_without_an_open_phase_nothing_is_added_and_the_codewords_learn() -> None:
    one = collection()
    torch.nn.init.normal_(one.codewords.embedding_bags["t"].weight)
    features = KeyedJaggedTensor.from_lengths_sync(
        keys=["day", "b", "a"], values=torch.tensor([1, 5, 9]), lengths=torch.tensor([1, 1, 1])
    )
    found = one(features)
    torch.testing.assert_close(found["a"][0], embeddings(one)[9])
    found.values().sum().backward()
    assert one.codewords.embedding_bags["t"].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_a_phase_the_codewords_are_frozen_and_the_rows_and_other_tables_learn(dtype: str) -> None:
    one = learned(dtype)
    before = rows_of(one).clone()
    optimizer = RowWiseAdagrad(one.parameters(), lr=0.1)
    one(random_features(KEYS, batch_size=12, max_length=4, seed=0)).values().square().sum().backward()
    optimizer.step()
    assert one.codewords.embedding_bags["t"].weight.grad is None
    assert one.ebc.embedding_bags["d"].weight.grad is not None
    assert not torch.equal(rows_of(one), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fold_keeps_what_the_residents_learned(dtype: str) -> None:
    one = learned(dtype)
    before = embeddings(one)
    report = one.recluster(seed=1)["t"]
    after = embeddings(one)
    assert not one.remap.phase_is_open
    codebook = one.codewords.embedding_bags["t"].weight.detach().view(C, 2, K, D // C)[:, 0]
    nearest = torch.stack(
        [((before.view(N, C, -1)[:, j, None] - codebook[j]) ** 2).sum(-1).min(dim=1).values for j in range(C)]
    )
    torch.testing.assert_close(((after - before) ** 2).sum(1), nearest.sum(0), atol=1e-4, rtol=1e-4)
    assert report.objective == pytest.approx(float(nearest.sum(0).mean()), rel=1e-4)
    assert report.generation == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_their_optimizer_start_anew_in_every_phase(dtype: str) -> None:
    one = learned(dtype, fraction=0.7)
    optimizer = RowWiseAdagrad(one.parameters(), lr=0.1)
    one(random_features(KEYS, batch_size=50, max_length=4, seed=0)).values().square().sum().backward()
    optimizer.step()
    one.recluster(seed=1)
    first = one.remap.residency("t")
    one.admit(seed=1, optimizer=optimizer if dtype == "float32" else None)
    second = one.remap.residency("t")

    assert second.phases == 2
    assert (second.ages[first.ages != 0] == 0).all()  # they waited longer
    residents = torch.from_numpy(np.flatnonzero(second.ages == 0))
    rows, had_one = rows_of(one)[: len(residents)], torch.from_numpy(first.ages)[residents] != 255
    expected = -0.5 * embeddings(one, with_rows=False)[residents]
    tolerance = 2 * ROUNDINGS[dtype] if dtype != "int8" else 0.51 * float(rows_table(one).step)
    assert float((rows - expected)[had_one].abs().sum(1).max()) <= D * (tolerance + 1e-6)
    assert float(rows[~had_one].abs().max()) <= 0.1 + tolerance
    if dtype == "float32":
        momentum = optimizer.state[one.residents.embedding_bags["t_residents"].weight]["sum"]
        assert not momentum.any()
    else:
        assert not rows_table(one).state.any()


def test_frequent_ids_come_first() -> None:
    one, frequencies = collection(), np.arange(N)[::-1].copy()
    one.admit(seed=1, frequencies={"t": frequencies})
    np.testing.assert_array_equal(np.flatnonzero(one.remap.residency("t").ages == 0), np.arange(60))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_first_come_first_served(dtype: str) -> None:
    """Three lots of IDs come, of which the last finds fewer rows than it would need."""
    torch.manual_seed(0)
    residents = ResidentConfig(fraction=0.3, dtype=dtype, learning_rate=0.1, first_come=True)
    one = collection(residents=residents)
    torch.nn.init.normal_(one.codewords.embedding_bags["t"].weight)
    optimizer = RowWiseAdagrad(one.parameters(), lr=0.1)
    one.admit(seed=1, optimizer=optimizer if dtype == "float32" else None)  # nobody was seen
    assert one.remap.free_rows("t") == 60
    stamps = [one.remap.stamp()]
    counts = np.zeros(N, np.int64)
    for lot, free in ((np.arange(150, 190), 20), (np.arange(150, 190), 20), (np.arange(0, 100), 0)):
        counts[lot] += 1 + lot
        before, had = rows_of(one).clone(), one.remap.residency("t")
        with_them = np.flatnonzero(had.ages == 0)
        one.top_up(seed=1, frequencies={"t": counts})
        assert one.remap.free_rows("t") == free
        now = one.remap.residency("t").slots
        np.testing.assert_array_equal(now.of(with_them), had.slots.of(with_them))
        torch.testing.assert_close(rows_of(one)[: len(with_them)], before[: len(with_them)], atol=0, rtol=0)
        arrived = rows_of(one)[len(with_them) : now.num_slots]
        assert len(arrived) == 0 or 0 < float(arrived.abs().max()) <= 0.105
        stamps.append(one.remap.stamp())
        features = random_features(KEYS, batch_size=50, max_length=4, seed=free)
        optimizer.zero_grad()
        found = one(features)["a"]
        means = torch.stack([embeddings(one)[bag].sum(0) for bag in features["a"].to_dense()])
        torch.testing.assert_close(found, means, atol=1e-5, rtol=1e-5)
        found.square().sum().backward()
        optimizer.step()
    assert len({tuple(stamp.tolist()) for stamp in stamps}) == 3  # the second lot brought nobody
    residency = one.remap.residency("t")
    np.testing.assert_array_equal(np.flatnonzero(residency.ages == 0), np.r_[80:100, 150:190])
    with torch.no_grad():
        before = embeddings(one)
    one.top_up(seed=1, frequencies={"t": counts})
    assert one.remap.residency("t") is residency
    report = one.recluster(seed=1)["t"]
    assert report.objective == pytest.approx(float(((embeddings(one) - before) ** 2).sum(1).mean()), rel=1e-4)


def test_the_optimizer_state_of_arrivals_is_zero_and_that_of_others_stays() -> None:
    one = collection(residents=ResidentConfig(fraction=0.3, first_come=True))
    optimizer = RowWiseAdagrad(one.parameters(), lr=0.1)
    counts = np.where(np.arange(N) < 40, 1, 0)
    one.admit(seed=1, optimizer=optimizer, frequencies={"t": counts})
    one(random_features(KEYS, batch_size=50, max_length=4, seed=0)).values().square().sum().backward()
    optimizer.step()
    state = optimizer.state[one.residents.embedding_bags["t_residents"].weight]["sum"]
    before = state.clone()
    one.top_up(seed=1, frequencies={"t": np.ones(N, np.int64)})
    assert one.remap.free_rows("t") == 0
    assert before[:40].any()
    assert not state[40:].any()
    torch.testing.assert_close(state, before, atol=0, rtol=0)


def test_a_share_of_the_rows_is_kept_for_newcomers() -> None:
    """In a later phase, too, in which all rows would go to IDs that were seen."""
    few = collection(residents=ResidentConfig(fraction=0.3, newcomers=0.25))
    counts = np.where(np.arange(N) < 100, np.arange(N)[::-1] + 1, 0)
    for _ in range(2):
        few.admit(seed=1, frequencies={"t": counts})
        assert few.remap.free_rows("t") == 15
        few.recluster(seed=1)
    few.admit(seed=1, frequencies={"t": counts})
    had = few.remap.residency("t")
    counts[150:160] = 1
    few.top_up(seed=1, frequencies={"t": counts})
    now = few.remap.residency("t")
    arrived = np.flatnonzero((now.ages == 0) & (had.ages != 0))
    assert set(arrived) >= set(range(150, 160))
    assert all(had.ages[arrived] == NEVER)
    assert few.remap.free_rows("t") == 0 or counts[now.ages == NEVER].max() == 0
    with pytest.raises(ConfigError, match="newcomers=1 is not at least 0 and below 1"):
        ResidentConfig(newcomers=1)


def test_what_an_id_is_that_never_had_a_row() -> None:
    """Zero until the first fold; then, in each column, the codeword that is nearest to zero."""
    one = collection(residents=ResidentConfig(fraction=0.3, first_come=True))
    one.admit(seed=1, frequencies={"t": np.where(np.arange(N) < 60, 1, 0)})
    with torch.no_grad():
        one.residents.embedding_bags["t_residents"].weight.copy_(torch.randn(60, D))
    assert not embeddings(one)[60:].any()
    one.recluster(seed=1)
    codebook = one.codewords.embedding_bags["t"].weight.detach().view(C, 2, K, D // C)[:, 0]
    nearest = codebook[torch.arange(C), codebook.square().sum(2).argmin(dim=1)].flatten()
    torch.testing.assert_close(embeddings(one)[60:], nearest.expand(N - 60, D))


def test_residents_may_be_left_out() -> None:
    one = learned()
    features = random_features(KEYS, batch_size=12, max_length=1, seed=0)
    one.remap.leaves_out_residents = True
    bags = features["a"]
    filled = torch.repeat_interleave(torch.arange(12), bags.lengths())
    torch.testing.assert_close(one(features)["a"][filled], embeddings(one, with_rows=False)[bags.values()])


def test_raw_ids_of_a_vocabulary_have_the_rows_of_their_positions() -> None:
    one = collection()
    keys = np.random.default_rng(0).integers(-(2**62), 2**62, N)
    plain = one.pointer_map("t")
    one.attach_pointer_map("t", plain.with_vocabulary(Vocabulary.build(keys, num_threads=1), unseen="hash"))
    one.admit(seed=1)
    with torch.no_grad():
        one.residents.embedding_bags["t_residents"].weight.copy_(torch.randn(60, D))
    residents = np.flatnonzero(one.remap.residency("t").ages == 0)
    known = one.pointer_map("t").raw_ids(residents[:3])
    ids = torch.from_numpy(np.append(known, 12345))  # the last is of no vocabulary
    found = one(KeyedJaggedTensor(keys=["a", "b", "day"], values=ids, lengths=torch.tensor([1] * 4 + [0] * 8)))
    rows = rows_of(one)
    torch.testing.assert_close(found["a"], torch.cat([rows[:3], torch.zeros(1, D)]))  # codewords are zero


def test_a_clustered_map_of_other_ids_ends_the_phase_and_knows_their_ages() -> None:
    one, keys = learned(), np.arange(N)[::-1].copy()
    ages = one.remap.residency("t").ages
    other = one.pointer_map("t").with_vocabulary(Vocabulary.build(keys, num_threads=1))
    pointers = np.zeros((N, C), np.uint8)
    one.attach_pointer_map("t", other.clustered(pointers, other.next_helper_hash(1)))
    assert not one.remap.phase_is_open
    np.testing.assert_array_equal(one.remap.residency("t").ages, ages[::-1])


def test_another_map_ends_the_phase() -> None:
    one = learned()
    one.attach_pointer_map("t", one.pointer_map("t"))
    assert not one.remap.phase_is_open
    assert one.remap.residency("t").phases == 1


def grown(one: CCEEmbeddingBagCollection, keys: np.ndarray) -> None:
    vocabulary = Vocabulary.build(keys, num_threads=1)
    one.attach_pointer_map("t", one.pointer_map("t").with_vocabulary(vocabulary, unseen="hash"))


def of_keys(one: CCEEmbeddingBagCollection, keys: np.ndarray) -> torch.Tensor:
    """[N, D] of raw IDs, as the collection looks them up."""
    lengths = torch.tensor([1] * len(keys) + [0] * 2 * len(keys))
    features = KeyedJaggedTensor(keys=["a", "b", "day"], values=torch.from_numpy(keys), lengths=lengths)
    return one(features)["a"].detach()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("moves", [False, True], ids=["at the end", "anywhere"])
def test_a_vocabulary_that_grows_keeps_ages_rows_and_the_phase(dtype: str, moves: bool) -> None:
    """Known IDs may also get other positions, as where they are numbered by their frequency."""
    keys = np.random.default_rng(0).permutation(10 * N)[:N]
    few, many = keys[:150], np.random.default_rng(1).permutation(keys) if moves else keys
    one = collection(dtype)
    torch.nn.init.normal_(one.codewords.embedding_bags["t"].weight)
    grown(one, few)
    for seed in (1, 2):  # a second phase, so that ages differ
        if seed == 2:
            one.recluster(seed=1)
        one.admit(seed=seed)
        set_rows(one, dtype)
    before, old_ages = of_keys(one, few), one.remap.residency("t").ages
    grown(one, many)
    residency, positions = one.remap.residency("t"), one.pointer_map("t").positions(few)
    assert residency.is_open
    assert (residency.num_ids, residency.phases, residency.slots.num_slots) == (N, 2, 60)
    torch.testing.assert_close(of_keys(one, few), before, atol=0, rtol=0)
    np.testing.assert_array_equal(residency.ages[positions], old_ages)
    assert set(old_ages) == {0, 1, 255}
    assert (np.delete(residency.ages, positions) == 255).all()

    assert one.recluster(seed=1)["t"].generation == 2
    torch.testing.assert_close(of_keys(one, many), embeddings(one)[one.pointer_map("t").positions(many)])
    fresh = one.pointer_map("t").positions(keys[150:])
    one.admit(seed=1, frequencies={"t": np.where(np.isin(np.arange(N), fresh), 100, 0)})
    assert (one.remap.residency("t").ages[fresh] == 0).all()
    assert one.remap.residency("t").slots.num_slots == 60  # as the configuration says


def test_rows_of_ids_that_a_map_does_not_know_any_more_are_not_given_again() -> None:
    keys = np.random.default_rng(0).permutation(10 * N)[:N]
    one = collection(residents=ResidentConfig(fraction=0.3, first_come=True))
    grown(one, keys)
    one.admit(seed=1, frequencies={"t": (np.arange(N) < 40).astype(np.int64)})
    set_rows(one, "float32")
    residents = keys[one.remap.residency("t").ages == 0]
    kept = np.setdiff1d(keys, residents[::2])
    before = of_keys(one, residents[1::2])
    grown(one, kept)
    torch.testing.assert_close(of_keys(one, residents[1::2]), before, atol=0, rtol=0)
    assert one.remap.free_rows("t") == 60 - 40  # 20 of the others are lost until the next phase
    one.top_up(seed=1, frequencies={"t": np.ones(len(kept), np.int64)})
    residency = one.remap.residency("t")
    slots = residency.slots.of(np.flatnonzero(residency.ages == 0))
    assert sorted(slots) == [*range(1, 40, 2), *range(40, 60)]
    torch.testing.assert_close(of_keys(one, residents[1::2]), before, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_quantized_rows_go_on_from_the_state_dict(dtype: str) -> None:
    one, other = learned(dtype), collection(dtype)
    assert one.state_dict()["quantized_residents.tables.t_residents.rows"].dtype == getattr(torch, dtype)
    step_on = random_features(KEYS, batch_size=50, max_length=4, seed=1)
    one(step_on).values().square().sum().backward()
    other.load_state_dict(one.state_dict())
    other.remap.attach_residency("t", one.remap.residency("t"))
    for each in (one, other):
        each(step_on).values().square().sum().backward()
    torch.testing.assert_close(rows_of(other), rows_of(one), atol=0, rtol=0)
    torch.testing.assert_close(copy.deepcopy(one)(step_on).values(), other(step_on).values(), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
def test_a_gradient_that_no_row_can_be_trained_on_is_an_error_and_changes_nothing(dtype: str, value: float) -> None:
    one = learned(dtype)
    table = rows_table(one)
    before = [buffer.clone() for buffer in table.buffers()]
    residents = np.flatnonzero(one.remap.residency("t").ages == 0)
    others = np.flatnonzero(one.remap.residency("t").ages != 0)

    def step(bad: npt.NDArray[np.int64], good: npt.NDArray[np.int64]) -> None:
        ids = torch.from_numpy(np.concatenate([bad, good]))
        lengths = torch.tensor([1, 0, 0]).repeat_interleave(len(ids))
        pooled = one(KeyedJaggedTensor(keys=["a", "b", "day"], values=ids, lengths=lengths)).values()
        gradient = torch.ones_like(pooled)
        gradient[: len(bad), :D] = value
        pooled.backward(gradient)

    with pytest.raises(GradientError, match=r"'t_residents' is (nan|inf|-1e\+30); no row was changed"):
        step(residents[:1], residents[1:5])
    for buffer, old in zip(table.buffers(), before, strict=True):
        assert torch.equal(buffer, old)
    step(others[:2], residents[1:5])  # bad gradients that no row has a share in
    assert int(table.updates) == 1
    assert torch.isfinite(table.state).all()


def test_quantized_rows_of_a_variable_batch_that_nothing_repeats_are_refused() -> None:
    batch = KeyedJaggedTensor(
        keys=["day", "b", "a"],
        values=torch.arange(7),
        lengths=torch.ones(7, dtype=torch.int64),
        stride_per_key_per_rank=[[2], [3], [2]],
    )
    with pytest.raises(ConfigError, match="features have 2 and 3 bags; give the variable batch inverse_indices"):
        learned("int8")(batch)


def test_from_the_meta_device() -> None:
    for dtype in DTYPES:
        one = collection(dtype, device="meta").to_empty(device="cpu")
        one.reset_parameters()
        expected = collection(dtype)
        for each in (one, expected):
            each.admit(seed=1)
        torch.testing.assert_close(rows_of(one), rows_of(expected), atol=0, rtol=0)


def test_what_cannot_be_is_refused_and_changes_nothing() -> None:
    one = collection()
    with pytest.raises(ConfigError, match=r"frequencies are int64 \[3\]"):
        one.admit(seed=1, frequencies={"t": np.ones(3, np.int64)})
    with pytest.raises(ConfigError, match=r"frequencies of \['d'\], which are not CCE tables"):
        one.admit(seed=1, frequencies={"d": np.ones(7, np.int64)})
    assert one.remap.residency("t").phases == 0
    one = learned()
    with pytest.raises(ConfigError, match="a phase of residents is open; recluster first"):
        one.admit(seed=1)
    with torch.no_grad():
        one.residents.embedding_bags["t_residents"].weight[3, 2] = torch.nan
    before = one.pointer_map("t")
    with pytest.raises(ClusteringError, match=r"table 't': .*NaN or infinite"):
        one.recluster(seed=1, settings=ReclusterConfig(num_iterations=2))
    assert one.pointer_map("t") is before
    assert one.remap.phase_is_open
    with pytest.raises(ConfigError, match="the ages of 10 IDs are not those of its map's 200"):
        one.remap.attach_residency("t", Residency.nobody(10))
    many = Residency.nobody(N).next_phase(np.zeros(N, np.uint8))
    with pytest.raises(ConfigError, match="200 residents are more than its 60 rows"):
        one.remap.attach_residency("t", many)
    with pytest.raises(ConfigError, match="'d' is not a table with residents; those are: t"):
        one.remap.residency("d")
    with pytest.raises(ConfigError, match="no phase of residents is open, whose rows could be given; admit first"):
        collection().top_up(seed=1, frequencies={})
    free = collection(residents=ResidentConfig(first_come=True))
    free.admit(seed=1)
    with pytest.raises(ConfigError, match=r"frequencies are int64 \[3\]"):
        free.top_up(seed=1, frequencies={"t": np.ones(3, np.int64)})
    with pytest.raises(ConfigError, match=r"frequencies of \['d'\], which are not CCE tables"):
        free.top_up(seed=1, frequencies={"d": np.ones(7, np.int64)})
    assert free.remap.free_rows("t") == 50
    plain = CCEEmbeddingBagCollection(
        tables=[CCEEmbeddingBagConfig(name="t", num_embeddings=N, embedding_dim=D, num_rows=K, feature_names=["a"])]
    )
    with pytest.raises(ConfigError, match="no table has residents"):
        plain.admit(seed=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": 0.0}, "fraction=0.0 is not above 0 and at most 1"),
        ({"fraction": 1.5}, "fraction=1.5 is not above 0 and at most 1"),
        ({"fraction": float("nan")}, "fraction=nan is not above 0"),
        ({"shrinkage": 1.1}, r"shrinkage=1.1 is not in 0..1"),
        ({"dtype": "int4"}, "dtype='int4' is not one of float32, float16, int8"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 is not above 0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 is not at least 0"),
    ],
)
def test_configurations_that_cannot_be(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ResidentConfig(**arguments)


def test_bytes_while_training() -> None:
    """Rows, a float of row-wise Adagrad for each, and the ages and slots of all IDs."""
    sizes = {
        dtype: collection(dtype, fraction=0.5).cce_configs()[0].resident_bytes
        for dtype in ("float32", "float16", "int8")
    }
    assert sizes == {d: 100 * (b * D + 4) + N + 4 * 12 for d, b in (("float32", 4), ("float16", 2), ("int8", 1))}
