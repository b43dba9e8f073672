"""CAFE: its sketch against SpaceSaving on dictionaries, and its rows against a plain reference, one ID at a time."""

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec import KeyedJaggedTensor

from torchrec_cce import CafeEmbeddingBagConfig, CCEEmbeddingBagCollection
from torchrec_cce.errors import ConfigError
from torchrec_cce.hashing import UniversalHash, derive_seed, term_hash
from torchrec_cce.kernels.hot_sketch import NO_ID, NO_ROW, add_weights
from torchrec_cce.methods.cafe import Cafe

NUM_IDS, DIM, LEARNING_RATE = 40, 4, 0.5


def config(**changes: object) -> CafeEmbeddingBagConfig:
    sizes = {"num_hot": 6, "num_shared": 3, "interval": 2, "decay": 0.5, **changes}
    return CafeEmbeddingBagConfig(
        name="t", num_embeddings=NUM_IDS, embedding_dim=DIM, feature_names=["f", "g"], **sizes
    )


def batch(seed: int, *, first_id: int = 0) -> KeyedJaggedTensor:
    """Of two features, a few IDs much more often than the others."""
    rng = np.random.default_rng(seed)
    ids = np.minimum(rng.geometric(0.15, 40) - 1, NUM_IDS - 1)
    return KeyedJaggedTensor(
        keys=["f", "g"],
        values=torch.from_numpy((ids + first_id) % NUM_IDS),
        lengths=torch.ones(40, dtype=torch.int64),
    )


def trained(collection: CCEEmbeddingBagCollection, features: KeyedJaggedTensor) -> torch.Tensor:
    """A step of SGD on a made loss; the embeddings before it, `[20, 2·d]`."""
    embeddings: torch.Tensor = collection(features).values()
    cotangent = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(len(features.values())))
    collection.zero_grad()
    (embeddings * cotangent).sum().backward()
    with torch.no_grad():
        for parameter in collection.parameters():
            parameter -= LEARNING_RATE * parameter.grad
    return embeddings.detach()


def table_of(collection: CCEEmbeddingBagCollection) -> Cafe:
    table = collection.computed.tables["t"]
    assert isinstance(table, Cafe)
    return table


class Reference:
    """One ID at a time, on dictionaries."""

    def __init__(self, table: CafeEmbeddingBagConfig, weight: torch.Tensor) -> None:
        seed = derive_seed(table.seed, table.name)
        self.config, self.weight = table, weight.detach().clone()
        self.shared = term_hash(seed, 0, num_columns=1, num_rows=table.num_shared)
        self.bucket = UniversalHash.from_seed(derive_seed(seed, "buckets"), num_columns=1, num_rows=table.num_buckets)
        self.slots: list[list[dict[str, float] | None]] = [[None] * 4 for _ in range(table.num_buckets)]
        self.batches = 0

    def row(self, raw_id: int) -> int:
        bucket = self.slots[int(self.bucket.numpy(np.array([raw_id]))[0, 0])]
        own = [slot["row"] for slot in bucket if slot is not None and slot["id"] == raw_id]
        shared = self.config.num_hot + int(self.shared.numpy(np.array([raw_id]))[0, 0])
        return int(own[0]) if own and own[0] != NO_ROW else shared

    def begin_batch(self) -> None:
        if self.batches and self.batches % self.config.interval == 0:
            known = [slot for bucket in self.slots for slot in bucket if slot is not None]
            hot = sorted(known, key=lambda slot: -slot["score"])[: self.config.num_hot]
            for slot in known:
                if all(slot is not other for other in hot):
                    slot["row"] = NO_ROW
            free = sorted(set(range(self.config.num_hot)) - {slot["row"] for slot in hot})
            for slot in known:
                if any(slot is other for other in hot) and slot["row"] == NO_ROW:
                    row = free.pop(0)
                    self.weight[row] = self.weight[self.row(int(slot["id"]))]
                    slot["row"] = row
            for slot in known:
                slot["score"] *= self.config.decay
        self.batches += 1

    def step(self, ids: Sequence[int], gradients: torch.Tensor) -> None:
        """`gradients: [N, d]` of the embeddings of `ids: [N]`, in the order in which they are taken."""
        rows = [self.row(raw_id) for raw_id in ids]
        for raw_id, gradient in zip(ids, gradients, strict=True):
            bucket = self.slots[int(self.bucket.numpy(np.array([raw_id]))[0, 0])]
            at = next((s for s, slot in enumerate(bucket) if slot is not None and slot["id"] == raw_id), None)
            if at is None:
                at = min(range(4), key=lambda s: 0.0 if bucket[s] is None else bucket[s]["score"])
                score = 0.0 if bucket[at] is None else bucket[at]["score"]
                bucket[at] = {"id": raw_id, "score": score, "row": NO_ROW}
            bucket[at]["score"] += float(gradient.norm())
        for row, gradient in zip(rows, gradients, strict=True):
            self.weight[row] -= LEARNING_RATE * gradient


def test_equals_its_definition_batch_by_batch() -> None:
    """IDs turn hot and, when the log shifts by half, cold again."""
    torch.manual_seed(0)
    collection = CCEEmbeddingBagCollection([config()])
    reference = Reference(config(), table_of(collection).weight)
    were_hot: list[set[int]] = []
    for number in range(24):
        features = batch(number, first_id=NUM_IDS // 2 * (number // 12))
        reference.begin_batch()
        first, second = features.values()[:20].tolist(), features.values()[20:].tolist()
        wanted = torch.cat(
            [torch.stack([reference.weight[reference.row(i)] for i in ids]) for ids in (first, second)], dim=1
        )
        got = trained(collection, features)
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
        cotangent = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(40))
        # The backward pass comes to the second feature first.
        reference.step(second + first, torch.cat([cotangent[:, DIM:], cotangent[:, :DIM]]))
        table = table_of(collection)
        were_hot.append(set(table.ids[table.rows != NO_ROW].tolist()))
        torch.testing.assert_close(table.weight, reference.weight, atol=1e-5, rtol=1e-5)
    assert were_hot[1] == set()
    assert 4 <= len(were_hot[11]) <= 6
    assert not were_hot[11] & were_hot[23] & set(range(3))


def test_an_id_begins_with_its_shared_row_and_goes_back_to_it() -> None:
    collection = CCEEmbeddingBagCollection([config(num_hot=1, num_shared=1, interval=1)])
    table = table_of(collection)
    shared = table.weight[1].detach().clone()

    def look_up(raw_id: int, *, learns: bool) -> torch.Tensor:
        features = KeyedJaggedTensor(keys=["f", "g"], values=torch.tensor([raw_id]), lengths=torch.tensor([1, 0]))
        collection.train(learns)
        pooled: torch.Tensor = collection(features)["f@t" if "f@t" in collection(features).keys() else "f"]  # noqa: SIM118
        return pooled[0]

    first = look_up(7, learns=True)
    assert torch.equal(first, shared)
    first.sum().backward()
    assert torch.equal(look_up(7, learns=True), shared)  # hot, with what it had
    assert table.rows.max() == 0
    with torch.no_grad():
        table.weight[0] += 1
    assert torch.equal(look_up(7, learns=False), shared + 1)
    assert torch.equal(look_up(8, learns=False), shared)
    for _ in range(5):
        (look_up(8, learns=True) * 100).sum().backward()
    assert torch.equal(look_up(7, learns=False), shared)


def test_goes_on_from_its_state() -> None:
    torch.manual_seed(0)
    whole, restored = (CCEEmbeddingBagCollection([config()]) for _ in range(2))
    for number in range(5):
        trained(whole, batch(number))
    restored.load_state_dict(copy.deepcopy(whole.state_dict()))
    for number in range(5, 10):
        assert torch.equal(trained(whole, batch(number)), trained(restored, batch(number)))


def test_evaluations_leave_the_sketch_alone() -> None:
    collection = CCEEmbeddingBagCollection([config()])
    trained(collection, batch(0))
    before = copy.deepcopy(collection.state_dict())
    collection.eval()
    collection(batch(1)).values().sum().backward()
    collection.train()
    with torch.no_grad():
        collection(batch(1))
    for name, value in collection.state_dict().items():
        assert torch.equal(value, before[name])


@given(st.lists(st.tuples(st.integers(0, 12), st.floats(2**-10, 4, width=32)), max_size=60))
def test_the_sketch_is_space_saving_in_each_bucket(stream: list[tuple[int, float]]) -> None:
    ids, scores = np.full((3, 2), NO_ID, np.int64), np.zeros((3, 2), np.float32)
    rows = np.full((3, 2), NO_ROW, np.int32)
    seen = np.array([raw_id for raw_id, _ in stream], np.int64)
    weights = np.array([weight for _, weight in stream], np.float32)
    add_weights(seen, seen % 3, weights, ids, scores, rows)
    for bucket in range(3):
        wanted: dict[int, np.float32] = {}
        for raw_id, weight in zip(seen.tolist(), weights, strict=True):
            if raw_id % 3 != bucket:
                continue
            if raw_id not in wanted and len(wanted) == 2:
                lightest = min(wanted, key=lambda each: wanted[each])
                wanted = {raw_id if key == lightest else key: value for key, value in wanted.items()}
            wanted[raw_id] = np.float32(wanted.get(raw_id, np.float32(0)) + weight)
        assert {int(i): s for i, s in zip(ids[bucket], scores[bucket], strict=True) if i != NO_ID} == wanted


def test_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    collection = CCEEmbeddingBagCollection([config()])
    with pytest.raises(ConfigError, match="'cafe' trains in one process: its sketch would be another on each of the 2"):
        collection(batch(0))
    with pytest.raises(ConfigError, match=r"decay=0 is not above 0 and at most 1; 0\.98 is usual"):
        config(decay=0)
