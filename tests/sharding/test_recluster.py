"""Reclustering under sharding gives the bits that `CCEEmbeddingBagCollection.recluster` gives on one process."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support import runs
from tests.support.launch import on_ranks
from tests.support.sharded_models import TABLES, Table, assert_same_bits, split_by_rows, tables_of
from torchrec_cce import CCEEmbeddingBagCollection
from torchrec_cce.clustering.settings import ReclusterConfig
from torchrec_cce.errors import CCEError
from torchrec_cce.maps.vocabulary import Vocabulary
from torchrec_cce.sharding.executor import _balanced
from torchrec_cce.sharding.recluster import recluster_sharded
from torchrec_cce.sharding.tables import collections_of
from torchrec_cce.training.config import RunConfig
from torchrec_cce.training.input import num_dense, read_batches
from torchrec_cce.training.model import build_model
from torchrec_cce.training.parallel import process_group, shard

SETTINGS = ReclusterConfig(helper_init="residual", num_iterations=20)


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def recluster_on_a_rank(
    config: RunConfig,
    frequencies: dict[str, npt.NDArray[np.int64]],
    poison: str | None,
    folders: tuple[str, ...] = ("",),
    full_disk: bool = False,
    keyed: bool = False,
) -> tuple[dict[str, Table], dict[str, Table], str]:
    """The tables before and after a clustering in the middle of training, and the error, if any.

    Ranks with different `folders`, in turn, are as if on different hosts.
    """
    folder = folders[int(os.environ["RANK"]) % len(folders)]
    if folder:
        os.environ["TORCHREC_CCE_CACHE"] = folder
    if full_disk and os.environ["RANK"] == "1":
        os.posix_fallocate = no_space
    with process_group() as ranks:
        model = build_model(config, num_dense=num_dense(config), device=ranks.device)
        plan = split_by_rows(model, config.optimizer, world_size=ranks.world_size)
        model, optimizer = shard(model, plan, config.optimizer, ranks)
        (collection,) = collections_of(model).values()
        if keyed:
            plain = collection.pointer_map("C1")
            keys = np.random.default_rng(1).permutation(plain.num_ids)
            collection.attach_pointer_map("C1", plain.with_vocabulary(Vocabulary.build(keys, num_threads=1)))
        remap = collection.remap
        for batch in read_batches(config, config.data.train, remap=remap, rank=ranks.rank, world_size=ranks.world_size):
            optimizer.zero_grad()
            model(batch.part)[: batch.rows].square().sum().backward()
            optimizer.step()
        if poison is not None:
            ((path, _),) = collections_of(model).items()
            value: Any = model.state_dict()[f"{path}.ebc.embedding_bags.{poison}.weight"]
            with torch.no_grad():
                if not hasattr(value, "local_shards"):
                    value[0, 0] = torch.nan
                elif ranks.rank == ranks.world_size - 1:
                    value.local_shards()[0].tensor[0, 0] = torch.nan
        before = tables_of(model, optimizer)
        message = ""
        try:
            recluster_sharded(model, optimizer, seed=5, frequencies=frequencies, settings=SETTINGS)
        except (CCEError, OSError) as error:
            message = f"{type(error).__name__}: {error}"
        return before, tables_of(model, optimizer), message


def run(
    folder: Path,
    log: Path,
    *,
    world_size: int = 2,
    poison: str | None = None,
    weighed: bool = False,
    hosts: int = 1,
    full_disk: bool = False,
    keyed: bool = False,
    **changes: Any,
) -> tuple[RunConfig, dict[str, npt.NDArray[np.int64]], list[tuple[dict[str, Table], dict[str, Table], str]]]:
    config = runs.criteo_config(
        log, data={"train": {"path": str(log), "max_rows": 200}}, training={"batch_size": 50}, **changes
    )
    rng = np.random.default_rng(0)
    sizes = {"C1": 1000, "C2": 800}
    frequencies = {name: rng.integers(0, 9, n) for name, n in sizes.items()} if weighed else {}
    folders = tuple(str(folder / f"host-{host}") for host in range(hosts))
    finished = on_ranks(folder, world_size, recluster_on_a_rank, config, frequencies, poison, folders, full_disk, keyed)
    for rank in finished:
        assert rank.code == 0, rank.stderr
    assert not [path for path in folder.rglob("live/*") if path.is_file()], "no file outlives the clustering"
    return config, frequencies, [rank.value for rank in finished]


@pytest.mark.parametrize(
    ("optimizer", "num_columns", "num_states", "weighed", "world_size", "hosts", "keyed"),
    [
        ("rowwise_adagrad", 4, 1, False, 2, 1, False),
        ("rowwise_adagrad", 4, 1, True, 3, 2, True),  # ranks 0 and 2 on one host
        ("rowwise_adagrad", 8, 1, False, 2, 2, False),
        ("adagrad", 4, 1, False, 1, 1, False),
        ("sgd", 4, 0, False, 2, 1, False),
        ("adamw", 4, 2, True, 2, 1, False),
    ],
)
def test_ranks_give_the_bits_of_one_process(
    log: Path,
    tmp_path: Path,
    optimizer: str,
    num_columns: int,
    num_states: int,
    weighed: bool,
    world_size: int,
    hosts: int,
    keyed: bool,
) -> None:
    changes = {"optimizer": {"embedding": optimizer}, "embedding": {"num_columns": num_columns}}
    config, frequencies, ranks = run(
        tmp_path, log, weighed=weighed, world_size=world_size, hosts=hosts, keyed=keyed, **changes
    )
    before, _, message = ranks[0]
    assert message == ""

    collection = CCEEmbeddingBagCollection(tables=config.table_configs())
    torch_optimizer = torch.optim.SGD(collection.parameters(), lr=0.1)
    for name in TABLES:
        collection.attach_pointer_map(name, before[name].pointer_map)
        weight = collection.ebc.embedding_bags[name].weight
        weight.data.copy_(torch.from_numpy(before[name].weights))
        torch_optimizer.state[weight] = {n: torch.from_numpy(s.copy()) for n, s in before[name].states.items()}
        assert len(before[name].states) == num_states
        assert all(state.any() for state in before[name].states.values()), "a state of zeros proves nothing"
    collection.recluster(seed=5, optimizer=torch_optimizer, frequencies=frequencies, settings=SETTINGS)
    for name in TABLES:
        weight = collection.ebc.embedding_bags[name].weight
        states = {n: torch_optimizer.state[weight][n].numpy() for n in before[name].states}
        expected = Table(weight.detach().numpy(), states, collection.pointer_map(name))
        assert expected.weights.tobytes() != before[name].weights.tobytes()
        for _, found, _ in ranks:
            assert_same_bits(found[name], expected)


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adamw"])
def test_an_error_reaches_both_ranks_and_changes_nothing(log: Path, tmp_path: Path, optimizer: str) -> None:
    """The second table is bad, so that the first was clustered already."""
    _, _, ranks = run(tmp_path, log, poison="C2", optimizer={"embedding": optimizer})
    messages = {message for _, _, message in ranks}
    assert len(messages) == 1
    assert messages.pop().startswith("ClusteringError: table 'C2': ")
    for before, after, _ in ranks:
        for name in TABLES:
            assert_same_bits(after[name], before[name])


def test_a_full_disk_on_one_host_changes_nothing_on_any(log: Path, tmp_path: Path) -> None:
    _, _, ranks = run(tmp_path, log, hosts=2, full_disk=True)
    for before, after, message in ranks:
        assert message == "OSError: [Errno 28] No space left on device"
        for name in TABLES:
            assert_same_bits(after[name], before[name])


@given(costs=st.lists(st.integers(1, 100), max_size=30), num_workers=st.integers(1, 5))
def test_columns_are_balanced_by_cost(costs: list[int], num_workers: int) -> None:
    columns = [(f"t{i // 4:03}", i % 4) for i in range(len(costs))]
    shares = _balanced(columns, costs, num_workers)
    assert sorted(column for share in shares for column in share) == columns
    loads = [sum(costs[columns.index(column)] for column in share) for share in shares]
    # Graham's bound for the longest task first: 4/3 of the best, which is no less than the mean and the largest task.
    assert max(loads) <= 4 / 3 * max(sum(costs) / num_workers, max(costs, default=0)) + max(costs, default=0) / 3


def test_frequencies_of_an_unknown_table(log: Path, tmp_path: Path) -> None:
    config = runs.criteo_config(log, data={"train": {"path": str(log), "max_rows": 50}})
    for rank in on_ranks(tmp_path, 2, recluster_on_a_rank, config, {"C3": np.ones(50, np.int64)}, None):
        assert rank.value[2] == "ConfigError: frequencies of ['C3'], which are not CCE tables; those are: C1, C2"
