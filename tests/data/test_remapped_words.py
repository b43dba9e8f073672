"""Remapped data as words, looked up without rows: what raw IDs and rows give, and words of other maps are refused."""

import copy
import pickle
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from torchrec import KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist

from tests.support.module_cases import cce
from tests.support.remapped_files import write_remapped
from tests.support.remapped_inputs import COLUMNS, collection, kjt, raw_log
from torchrec_cce import (
    CCEEmbeddingBagCollection,
    QuotientRemainderEmbeddingBagConfig,
    ResidentConfig,
    Vocabulary,
)
from torchrec_cce.data.remapped import RemappedLog
from torchrec_cce.data.rows import Rows, concat, to_batch
from torchrec_cce.errors import ConfigError, InvalidIDError, MapMismatchError
from torchrec_cce.sharding.sharders import get_cce_sharders


def read(path: Path, model: CCEEmbeddingBagCollection, **options: Any) -> tuple[RemappedLog, Rows]:
    log = RemappedLog(model.remap, label="label", columns=COLUMNS, **options)
    return log, concat(list(log.read(path)))


def words_of(path: Path, model: CCEEmbeddingBagCollection) -> KeyedJaggedTensor:
    log, packed = read(path, model)
    form = model.remap.word_form
    assert form is not None
    return to_batch(log.to_words(packed), form.keys).sparse_features


def rows_of(path: Path, model: CCEEmbeddingBagCollection) -> KeyedJaggedTensor:
    log, packed = read(path, model)
    return to_batch(log.to_rows(packed), model.remap.row_keys).sparse_features


def is_packed(model: CCEEmbeddingBagCollection, features: KeyedJaggedTensor) -> bool:
    with mock.patch.object(model.ebc, "forward", wraps=model.ebc.forward) as stock, torch.no_grad():
        model(features)
    return not stock.called


@pytest.mark.parametrize("layout", ["words", "lists"])
@pytest.mark.parametrize("helper", ["drop", "store", "keep-raw"])
@pytest.mark.parametrize(
    ("num_columns", "num_rows", "min_pointer_bits"),
    [(4, 10, 4), (4, 10, 8), (16, 256, 8), (8, 70_000, 8), (1, 257, 8)],
)
def test_words_are_rows_and_raw_ids(
    tmp_path: Path, layout: Any, helper: Any, num_columns: int, num_rows: int, min_pointer_bits: Any
) -> None:
    """Features of one and of several words, those on two tables, and of hashed and full tables."""
    model = collection(
        use_helper=helper != "drop", num_columns=num_columns, num_rows=num_rows, min_pointer_bits=min_pointer_bits
    )
    raw = raw_log()
    path = write_remapped(tmp_path / "log.parquet", raw, model, layout=layout, helper=helper, columns=COLUMNS)
    words, rows = words_of(path, model), rows_of(path, model)
    as_rows = model.remap(words)
    assert as_rows.keys() == rows.keys()
    assert torch.equal(as_rows.values(), rows.values())
    assert torch.equal(as_rows.lengths(), rows.lengths())
    assert model.takes_words
    assert is_packed(model, words)
    assert not is_packed(model, rows)
    found = model(words)
    assert torch.equal(found.values(), model(kjt(model, raw)).values()), "the loops are the same"
    assert found.keys() == model(rows).keys()
    torch.testing.assert_close(found.values(), model(rows).values(), atol=1e-6, rtol=1e-6)


def test_a_code_that_its_table_does_not_have_is_named(tmp_path: Path) -> None:
    """The loops would read, and write to, memory of others."""
    model, raw = collection(num_rows=300), raw_log()
    path = write_remapped(tmp_path / "log.parquet", raw, model, columns=COLUMNS)
    words, form = words_of(path, model), model.remap.word_form
    assert form is not None
    flat = words.values().view(form.layout.num_words, -1)
    refused = 0
    for (table, feature), first in zip(form.table_features, form.layout.first_words, strict=True):
        start = words.offset_per_key()[form.features.index(feature)]
        for word in range(first, first + form.shape(table, feature).num_words):
            before = flat[word, start].item()
            flat[word, start] = -1
            with pytest.raises(InvalidIDError, match=rf"feature '{feature}': its words say row .* of table '{table}'"):
                model(words)
            flat[word, start] = before
            refused += 1
    assert refused >= form.layout.num_words
    model(words)


def test_losses_of_twenty_steps(tmp_path: Path) -> None:
    losses: dict[str, list[float]] = {}
    first, raw = collection(), raw_log(num_rows=200)
    path = write_remapped(tmp_path / "log.parquet", raw, first, columns=COLUMNS)
    inputs = {"words": words_of(path, first), "rows": rows_of(path, first), "raw IDs": kjt(first, raw)}
    for kind, features in inputs.items():
        model = copy.deepcopy(first)
        optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
        losses[kind] = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(features).values().sub(1).square().mean()
            loss.backward()
            optimizer.step()
            losses[kind].append(loss.item())
    assert losses["words"] == losses["raw IDs"]
    np.testing.assert_allclose(losses["words"], losses["rows"], rtol=1e-6)
    assert losses["words"][-1] < losses["words"][0]


def test_words_of_other_maps_are_refused_by_name(tmp_path: Path) -> None:
    """Wherever they went in between."""
    model, raw = collection(), raw_log()
    path = write_remapped(tmp_path / "log.parquet", raw, model, columns=COLUMNS)
    words = words_of(path, model)
    for moved in (words, pickle.loads(pickle.dumps(words)), words.to(torch.device("cpu"), non_blocking=True)):
        assert is_packed(model, moved)
    expected = model(words).values()
    again = model.pointer_map("again")
    model.attach_pointer_map("again", again.clustered(again.stored_view, again.next_helper_hash(3)))
    for take in (model, model.remap):
        for moved in (words, pickle.loads(pickle.dumps(words))):
            with pytest.raises(MapMismatchError, match=r"'friends': its words .* to \['t_user', 'again'\]"):
                take(moved)
    model.attach_pointer_map("again", again)
    assert torch.equal(model(words).values(), expected)


def test_words_of_another_collection_and_bags_that_are_none(tmp_path: Path) -> None:
    model, raw = collection(), raw_log()
    words = words_of(write_remapped(tmp_path / "log.parquet", raw, model, columns=COLUMNS), model)
    other = CCEEmbeddingBagCollection(tables=[cce()])
    with pytest.raises(ConfigError, match=r"under keys \['user#word.0', .* collection under \['user#word.0'"):
        other(words)
    shifted = words.lengths().clone()  # from the first word of an ID to the last
    shifted[int(shifted.nonzero()[0])] -= 1
    shifted[-1] += 1
    for lengths in (torch.zeros_like(shifted), shifted):
        broken = KeyedJaggedTensor(keys=words.keys(), values=words.values(), lengths=lengths)
        with pytest.raises(ConfigError, match=r"bags are not those of 4 words an ID of 4 features in a batch of 23"):
            model(broken)
    by_name = KeyedJaggedTensor(keys=list(map(str, words.keys())), values=words.values(), lengths=words.lengths())
    with pytest.raises(ConfigError, match="no features"):
        model(by_name)


def test_where_words_cannot_go_rows_do(tmp_path: Path) -> None:
    model, raw = collection(), raw_log()
    path = write_remapped(tmp_path / "log.parquet", raw, model, columns=COLUMNS)
    expected, words = model(rows_of(path, model)).values(), words_of(path, model)
    model.ebc.register_forward_hook(lambda *_: None)
    assert not model.takes_words
    assert torch.equal(model(words).values(), expected)

    with_residents = CCEEmbeddingBagCollection(tables=[cce(residents=ResidentConfig())])
    assert not with_residents.takes_words
    assert with_residents.remap.word_form is None
    with pytest.raises(ConfigError, match="has residents or weights"):
        with_residents(words)


def test_raw_ids_outside_their_tables(tmp_path: Path) -> None:
    model, raw = collection(), raw_log()
    for name, value in (("day", 7), ("tags", 100)):
        at, kind = raw.schema.get_field_index(name), raw.schema.field(name).type
        far = raw.set_column(at, name, pa.array([[value] if name == "tags" else value] * len(raw), kind))
        log, packed = read(write_remapped(tmp_path / f"{name}.parquet", far, model, columns=COLUMNS), model)
        feature = "tag" if name == "tags" else name
        for finish in (log.to_words, log.to_rows):
            with pytest.raises(InvalidIDError, match=rf"'{feature}': raw ID {value} \(position 0 of its 23 values\)"):
                finish(packed)


def test_arbitrary_ids_of_all_policies(tmp_path: Path) -> None:
    """Which the files have resolved; beside a table whose words are its rows."""
    ids = np.random.default_rng(3).integers(-(2**63), 2**63 - 1, 50)
    for unseen in ("hash", "first_row"):
        model = collection(clusterings=0)
        for table in model.cce_tables():
            known = Vocabulary.build(ids[:25])
            model.attach_pointer_map(table, model.pointer_map(table).with_vocabulary(known, unseen=unseen))
        model.recluster(seed=0)
        raw = raw_log(ids=ids)
        path = write_remapped(tmp_path / f"{unseen}.parquet", raw, model, columns=COLUMNS)
        assert torch.equal(model(words_of(path, model)).values(), model(kjt(model, raw)).values())


def test_a_table_whose_words_are_its_rows(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"num_embeddings": 100, "feature_names": ["tag"], "embedding_dim": 8, "num_rows": 20}
    model = CCEEmbeddingBagCollection(
        tables=[
            cce(num_embeddings=50),
            QuotientRemainderEmbeddingBagConfig(name="qr", operation="concat", **sizes),
        ]
    )
    raw = raw_log()
    path = write_remapped(tmp_path / "log.parquet", raw, model, columns=COLUMNS)
    words, rows = words_of(path, model), rows_of(path, model)
    assert torch.equal(model.remap(words).values(), rows.values())
    torch.testing.assert_close(model(words).values(), model(rows).values(), atol=1e-6, rtol=1e-6)


@pytest.mark.usefixtures("one_rank")
def test_words_go_through_loaders_and_pipelines(tmp_path: Path) -> None:
    """Ahead of the model a pipeline's remap makes rows of them; a plain one hands them on."""
    first, raw = collection(), raw_log()
    log, packed = read(write_remapped(tmp_path / "log.parquet", raw, first, columns=COLUMNS), first)
    form = first.remap.word_form
    assert form is not None
    items = [to_batch(log.to_words(packed[i : i + 5]), form.keys).sparse_features for i in range(0, 20, 5)]
    losses = {}
    for pipeline_of in (None, TrainPipelineBase, TrainPipelineSparseDist):
        torch.manual_seed(0)  # of the weights
        model = DistributedModelParallel(
            _Loss(copy.deepcopy(first)), device=torch.device("cpu"), sharders=get_cce_sharders()
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = DataLoader(items, batch_size=None, num_workers=1, multiprocessing_context="fork")
        losses[pipeline_of] = found = []
        if pipeline_of is None:
            for features in loader:
                optimizer.zero_grad()
                loss, _ = model(features)
                loss.backward()
                optimizer.step()
                found.append(loss.item())
            continue
        options = {"pipeline_postproc": True} if pipeline_of is TrainPipelineSparseDist else {}
        pipeline, batches = pipeline_of(model, optimizer, torch.device("cpu"), **options), iter(loader)
        with suppress(StopIteration):
            while True:
                found.append(pipeline.progress(batches).sum().item())
    assert len(losses[None]) == 4
    for found in losses.values():
        np.testing.assert_allclose(found, losses[None], rtol=1e-6)


class _Loss(nn.Module):
    def __init__(self, model: CCEEmbeddingBagCollection) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: KeyedJaggedTensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss = self.model(features).values().sub(1).square().mean()
        return loss, loss.detach()


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
