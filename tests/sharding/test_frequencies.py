"""Counts of all ranks, one copy a host, against one array and `np.add.at`."""

import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.processes import Peak
from tests.support.launch import on_ranks
from torchrec_cce import CCEEmbeddingBagConfig, PointerMap
from torchrec_cce.clustering.sample import Frequencies
from torchrec_cce.maps.vocabulary import Vocabulary
from torchrec_cce.modules.remap import Remap
from torchrec_cce.sharding import frequencies as module
from torchrec_cce.sharding.frequencies import ShardedFrequencies
from torchrec_cce.training.parallel import process_group

Integers = npt.NDArray[np.int64]
FEATURES = {"user": ["user", "friend"], "item": ["item"], "day": ["day"]}
"""Of each table; `item` has no vocabulary, and `day` no map."""
ITEMS = 17
Step = tuple[str, Any]
"""`("batch", bags of each feature)`; `("move", keys of the users from then on)`; `("totals", None)`; or
`("resume", None)` from the totals as a checkpoint has them."""


def remap_of(keys: Sequence[int]) -> Remap:
    shared: dict[str, Any] = {"embedding_dim": 4, "num_rows": 2, "num_columns": 1}
    user, item, day = FEATURES.values()
    remap = Remap(
        [
            CCEEmbeddingBagConfig(name="user", num_embeddings=100, feature_names=user, **shared),
            CCEEmbeddingBagConfig(name="item", num_embeddings=ITEMS, feature_names=item, **shared),
            CCEEmbeddingBagConfig(name="day", num_embeddings=7, feature_names=day, **shared),
        ],
        is_weighted=False,
    )
    vocabulary = Vocabulary.build(np.array(keys, np.int64), num_threads=1)
    remap.attach_pointer_map("user", remap.pointer_map("user").with_vocabulary(vocabulary))
    return remap


def maps_of(remap: Remap) -> dict[str, PointerMap]:
    return {name: remap.pointer_map(name) for name in ("user", "item")}


def features_of(bags: Mapping[str, Sequence[Sequence[int]]]) -> KeyedJaggedTensor:
    flat = [bag for name in bags for bag in bags[name]]
    return KeyedJaggedTensor(
        keys=list(bags),
        values=torch.tensor([one for bag in flat for one in bag], dtype=torch.int64),
        lengths=torch.tensor([len(bag) for bag in flat], dtype=torch.int32),
    )


def play(steps: Sequence[Step], keys: Sequence[int], *, rank: int, world_size: int, most_kept: int) -> list[Any]:
    """What the totals were, on a rank that sees every so-manyth bag, and one more that does not count."""
    remap, seen = remap_of(keys), []
    counts = ShardedFrequencies({n: one.num_ids for n, one in maps_of(remap).items()}, most_kept=most_kept)
    for kind, what in [*steps, ("totals", None)]:
        if kind == "batch":
            mine = {name: [*bags[rank::world_size], [0, 1, 1]] for name, bags in what.items()}
            counts.count(remap, features_of(mine), len(mine["user"]) - 1)
        elif kind == "move":
            after = remap_of(what)
            counts, remap = counts.moved(maps_of(remap), maps_of(after)), after
        else:
            seen.append({name: one.tolist() for name, one in counts.totals().items()})
            if kind == "resume":
                counts = ShardedFrequencies.of({name: np.array(one) for name, one in seen[-1].items()})
    return seen


def expected(steps: Sequence[Step], keys: Sequence[int]) -> list[Any]:
    """The same, of all bags, with one array a table."""
    rows = {"user": {key: i for i, key in enumerate(keys)}, "item": {i: i for i in range(ITEMS)}}
    counts = {name: np.zeros(len(each), np.int64) for name, each in rows.items()}
    seen = []
    for kind, what in [*steps, ("totals", None)]:
        if kind == "batch":
            for name in counts:
                ids = [one for feature in FEATURES[name] for bag in what[feature] for one in bag]
                np.add.at(counts[name], [rows[name][one] for one in ids if one in rows[name]], 1)
        elif kind == "move":
            before, rows["user"] = rows["user"], {key: i for i, key in enumerate(what)}
            counts["user"] = np.array([counts["user"][before[key]] if key in before else 0 for key in what], np.int64)
        else:
            seen.append({name: one.tolist() for name, one in counts.items()})
    return seen


IDS = st.integers(-3, 25)
KEYS = st.lists(IDS, unique=True, min_size=1)


@st.composite
def batches(draw: st.DrawFn) -> dict[str, list[list[int]]]:
    size = draw(st.integers(0, 4))
    bags = st.lists(st.lists(IDS, max_size=4), min_size=size, max_size=size)
    return {feature: draw(bags) for features in FEATURES.values() for feature in features}


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("batch"), batches()),
        st.tuples(st.just("move"), KEYS),
        st.tuples(st.sampled_from(["totals", "resume"]), st.none()),
    ),
    max_size=12,
)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_RECEIVED", 3)
    monkeypatch.setattr(module, "_CHUNK", 4)


@pytest.mark.usefixtures("small_pieces")
def test_any_batches_exchanges_and_moves_on_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHREC_CCE_CACHE", str(tmp_path))

    @settings(max_examples=60, deadline=None)
    @given(steps=STEPS, keys=KEYS, most_kept=st.sampled_from([0, 5, 1000]))
    def check(steps: list[Step], keys: list[int], most_kept: int) -> None:
        assert play(steps, keys, rank=0, world_size=1, most_kept=most_kept) == expected(steps, keys)

    with process_group():
        check()
    assert not list((tmp_path / "live").iterdir())


def random_steps(rng: np.random.Generator) -> list[Step]:
    """As many of each kind as there are, so that every sequence moves and resumes."""
    kinds = rng.permutation(["batch"] * 8 + ["move"] * 2 + ["totals", "resume"])
    return [(kind, _random(kind, rng)) for kind in kinds.tolist()]


def _random(kind: str, rng: np.random.Generator) -> Any:
    if kind == "move":
        return random_keys(rng)
    if kind != "batch":
        return None
    size = int(rng.integers(0, 6))
    features = [feature for each in FEATURES.values() for feature in each]
    return {name: [rng.integers(-3, 26, rng.integers(0, 5)).tolist() for _ in range(size)] for name in features}


def random_keys(rng: np.random.Generator) -> list[int]:
    keys: list[int] = rng.permutation(np.arange(-3, 26))[: rng.integers(1, 29)].tolist()
    return keys


def play_on_a_rank(sequences: list[tuple[list[Step], list[int]]], folders: tuple[str, ...]) -> list[Any]:
    """Ranks with different `folders`, in turn, are as if on different hosts."""
    os.environ["TORCHREC_CCE_CACHE"] = folders[int(os.environ["RANK"]) % len(folders)]
    module._MOST_RECEIVED, module._CHUNK = 8, 4
    with process_group() as ranks:
        return [
            play(steps, keys, rank=ranks.rank, world_size=ranks.world_size, most_kept=5 * (number % 3))
            for number, (steps, keys) in enumerate(sequences)
        ]


@pytest.mark.parametrize(("world_size", "hosts"), [(2, 1), (2, 2), (3, 2)])
def test_any_batches_exchanges_and_moves_on_several_ranks(tmp_path: Path, world_size: int, hosts: int) -> None:
    rng = np.random.default_rng(world_size + hosts)
    sequences = [(random_steps(rng), random_keys(rng)) for _ in range(6)]
    folders = tuple(str(tmp_path / f"host-{host}") for host in range(hosts))
    finished = on_ranks(tmp_path, world_size, play_on_a_rank, sequences, folders)
    for rank in finished:
        assert rank.code == 0, rank.stderr
        assert rank.value == [expected(*each) for each in sequences]
    assert not [path for path in tmp_path.rglob("live/*") if path.is_file()]


def grown_on_a_rank(folder: str, num_ids: int, most_kept: int) -> int:
    """The most private memory while a rank counts, exchanges, reads the totals, moves them and starts from them."""
    os.environ["TORCHREC_CCE_CACHE"] = folder
    rng = np.random.default_rng(int(os.environ["RANK"]))
    config: dict[str, Any] = {"embedding_dim": 4, "num_rows": 2, "num_columns": 1, "feature_names": ["f"]}
    with process_group(), Peak("RssAnon") as memory:
        remap = Remap([CCEEmbeddingBagConfig(name="t", num_embeddings=num_ids, **config)], is_weighted=False)
        before = {"t": remap.pointer_map("t")}
        counts = ShardedFrequencies({"t": num_ids}, most_kept=most_kept)
        for _ in range(8):
            ids = torch.from_numpy(rng.integers(0, num_ids, 50_000))
            lengths = torch.ones(len(ids), dtype=torch.int32)
            counts.count(remap, KeyedJaggedTensor(keys=["f"], values=ids, lengths=lengths), len(ids))
        larger = {"t": PointerMap.hashed(num_ids=num_ids + 1, num_columns=1, num_rows=2, seed=0)}
        counts = ShardedFrequencies.of(counts.moved(before, larger).totals())
        assert Frequencies(counts.totals()["t"], num_ids + 1).total == 2 * 8 * 50_000
    return memory.grown


def test_private_memory_does_not_grow_with_the_number_of_ids(tmp_path: Path) -> None:
    few, many = 3_000_000, 15_000_000
    grown = []
    for n in (few, many):
        finished = on_ranks(tmp_path / str(n), 2, grown_on_a_rank, str(tmp_path), n, 100_000)
        assert all(rank.code == 0 for rank in finished), finished[0].stderr
        grown.append(max(rank.value for rank in finished))
    assert grown[1] - grown[0] < (many - few), f"{grown}: more than one of the eight bytes a count takes"


def full_on_a_rank(folders: tuple[str, ...]) -> str:
    os.environ["TORCHREC_CCE_CACHE"] = folders[int(os.environ["RANK"])]

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if os.environ["RANK"] == "1":
        os.posix_fallocate = no_space
    with process_group():
        try:
            ShardedFrequencies({"t": 5})
        except OSError as error:
            return str(error)
    return ""


def test_a_full_disk_on_one_host_is_an_error_on_all(tmp_path: Path) -> None:
    folders = tuple(str(tmp_path / f"host-{host}") for host in range(2))
    for rank in on_ranks(tmp_path, 2, full_on_a_rank, folders):
        assert rank.value == "[Errno 28] No space left on device"


def test_rows_that_stay_are_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHREC_CCE_CACHE", str(tmp_path))
    with process_group():
        remap, other = remap_of([3, 5]), remap_of([3, 5])
        counts = ShardedFrequencies({name: one.num_ids for name, one in maps_of(remap).items()})
        assert counts.moved(maps_of(remap), maps_of(other)) is counts
        assert counts.moved(maps_of(remap), maps_of(remap_of([5, 3]))) is not counts


def test_nothing_is_counted_where_no_table_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHREC_CCE_CACHE", str(tmp_path))
    with process_group():
        remap, counts = remap_of([3]), ShardedFrequencies({})
        counts.count(remap, features_of({"user": [[3]], "friend": [[]], "item": [[1]], "day": [[0]]}), 1)
        assert counts.totals() == {}
        assert counts.moved({}, {}) is counts
    assert not (tmp_path / "live").exists()
