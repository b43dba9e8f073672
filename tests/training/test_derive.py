"""Runs that start from the model of another: what they take over, what they learn, what they refuse."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.support.launch import on_ranks
from tests.support.runs import criteo_config, metrics, result
from torchrec_cce.clustering.quantize import quantize
from torchrec_cce.errors import ConfigError
from torchrec_cce.hashing import derive_seed
from torchrec_cce.methods.cce import CCEConfig
from torchrec_cce.training.config import RunConfig
from torchrec_cce.training.derive import _collections, _load, derived_model, embeddings
from torchrec_cce.training.input import read_batches
from torchrec_cce.training.loop import evaluate, train
from torchrec_cce.training.metrics import quality

CAP = 3200


@pytest.fixture(scope="module")
def source(log: Path) -> Path:
    """A run with full tables."""
    folder = log.parent / "full"
    train(config(log, method="full", max_parameters=None), folder, show_progress=False)
    return folder


def config(log: Path, *, derive: dict[str, Any] | None = None, epochs: int = 1, **embedding: Any) -> RunConfig:
    changes: dict[str, Any] = {"recluster": {"ct": 0, "cf": 0}, "training": {"epochs": epochs}}
    if derive is not None:
        changes["derive"] = derive
    return criteo_config(log, embedding={"max_parameters": CAP, **embedding}, **changes)


def derived(log: Path, source: Path, *, dense: bool = True, circular: bool = False, **choices: Any) -> RunConfig:
    return config(log, derive={"run": str(source), "dense": dense, "circular": circular}, **choices)


def test_product_quantization_after_training(log: Path, source: Path, tmp_path: Path) -> None:
    """Evaluated, it is the full model with its two large tables quantized, computed here by hand."""
    chosen = derived(log, source, method="pq", epochs=0)
    got = train(chosen, tmp_path / "pq", show_progress=False)
    assert got.steps == 0

    full = config(log, method="full", max_parameters=None)
    model = _load(source, full)
    ((_, collection),) = _collections(model)
    with torch.no_grad():
        for name, n in (("C1", 1000), ("C2", 800)):
            weight = collection.ebc.embedding_bags[name].weight
            found = quantize(
                weight.numpy().copy(),
                num_columns=4,
                num_terms=1,
                num_rows=CAP // 16,
                seed=derive_seed(chosen.seed, name, "derive"),
                settings=chosen.recluster.settings(),
            )
            columns = [found.codewords[j, 0][found.pointers[:, j, 0]] for j in range(4)]
            assert found.pointers.shape == (n, 4, 1)
            weight.copy_(torch.from_numpy(np.concatenate(columns, axis=1)))
        batches = read_batches(full, full.data.test, remap=collection.remap, rank=0, world_size=1)
        outputs = [torch.stack([model(batch.part), batch.part.labels]) for batch in batches]
    expected = quality(*torch.cat(outputs, dim=1))
    assert got.best["test_bce"] == pytest.approx(expected.bce, abs=1e-6)
    assert got.best["test_auc"] == pytest.approx(expected.auc, abs=1e-6)
    assert {*got.entropies} == {"C1", "C2"}
    assert 0 < got.entropies["C1"][0] <= np.log(CAP // 16)
    # The unquantized model is another one.
    assert evaluate(full, source, full.data.test).bce != pytest.approx(expected.bce, abs=1e-4)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_rows_quantized_after_training(log: Path, source: Path, tmp_path: Path, bits: int) -> None:
    """Evaluated, it is the full model with each row on 2^bits equally spaced values from its least to its largest."""
    full = config(log, method="full", max_parameters=None)
    chosen = config(log, derive={"run": str(source), "bits": bits}, epochs=0, method="full", max_parameters=None)
    got = train(chosen, tmp_path / "run", show_progress=False)
    rows = (1000 + 800 + 50) * (16 * bits // 8 + 4)
    assert got.sizes.table_bytes == got.sizes.total_bytes == rows
    assert got.sizes.training_bytes == (1000 + 800 + 50) * (16 * 4 + 4)
    assert got.sizes.parameters == got.sizes.full_parameters

    model = _load(source, full)
    ((_, collection),) = _collections(model)
    with torch.no_grad():
        for bag in collection.ebc.embedding_bags.values():
            least = bag.weight.min(dim=1, keepdim=True).values.half().float()
            scale = ((bag.weight.max(dim=1, keepdim=True).values - least) / (2**bits - 1)).half().float()
            bag.weight.copy_(((bag.weight - least) / scale).round().clamp(0, 2**bits - 1) * scale + least)
        batches = read_batches(full, full.data.test, remap=collection.remap, rank=0, world_size=1)
        outputs = [torch.stack([model(batch.part), batch.part.labels]) for batch in batches]
    expected = quality(*torch.cat(outputs, dim=1))
    assert got.best["test_bce"] == pytest.approx(expected.bce, abs=1e-6)
    assert got.best["test_auc"] == pytest.approx(expected.auc, abs=1e-6)
    unquantized = evaluate(full, source, full.data.test).bce
    assert got.best["test_bce"] == pytest.approx(unquantized, abs={8: 1e-4, 4: 1e-2, 2: 0.1}[bits])
    assert got.best["test_bce"] != unquantized


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 1}, "bits=4 is for embedding.method='full' with training.epochs=0; they are 'full' and 1"),
        ({"method": "pq", "max_parameters": CAP}, "bits=4 is for embedding.method='full'.*'pq' and 0"),
        ({"dim": 6}, "bits=4 needs embeddings of a multiple of 4 floats; dim is 6"),
    ],
)
def test_rows_that_cannot_be_quantized(log: Path, changes: dict[str, Any], message: str) -> None:
    values = {"method": "full", "max_parameters": None, "epochs": 0, **changes}
    with pytest.raises(ValidationError, match=message):
        config(log, derive={"run": "full", "bits": 4}, **values)


def test_bits_change_no_digest_of_runs_without_them(log: Path) -> None:
    assert "bits" not in derived(log, Path("full"), method="pq").as_dict()["derive"]


@pytest.mark.parametrize("method", ["cce", "cce_helpers", "pq", "rq", "rq_hash_embeddings"])
def test_every_method_comes_near_the_embeddings_it_starts_from(log: Path, source: Path, method: str) -> None:
    """Nearer than the mean of all, for all learn from the same; and the dense weights are those of the source."""
    chosen = derived(log, source, method=method)
    model = derived_model(chosen)
    whole = _load(source, config(log, method="full", max_parameters=None))
    ((path, collection),) = _collections(model)
    ((_, other),) = _collections(whole)
    tables = {table.name: table for table in other.embedding_bag_configs()}
    for table in collection.embedding_bag_configs():
        wanted = embeddings(other, tables[table.name])
        error = np.square(embeddings(collection, table) - wanted).mean()
        spread = np.square(wanted - wanted.mean(axis=0)).mean()
        if table.num_embeddings * 16 <= CAP:
            assert error == 0
        else:
            assert 0 < error < 0.8 * spread
    theirs = dict(whole.named_parameters())
    dense = {name: p for name, p in model.named_parameters() if not name.startswith(path)}
    assert len(dense) > 4
    for name, parameter in dense.items():
        assert torch.equal(parameter, theirs[name]), name


def test_without_dense_weights_only_pointers_and_words_are_taken(log: Path, source: Path) -> None:
    """Seeding with PQ."""
    one, other = (derived_model(derived(log, source, method="pq", dense=dense)) for dense in (True, False))
    ((path, collection),), ((_, seeded),) = _collections(one), _collections(other)
    for table in seeded.cce_configs():
        assert seeded.pointer_map(table.name).digest == collection.pointer_map(table.name).digest
    weights = dict(other.named_parameters())
    differing = [name for name, value in one.named_parameters() if not torch.equal(value, weights[name])]
    assert f"{path}.ebc.embedding_bags.C1.weight" not in differing
    assert f"{path}.ebc.embedding_bags.C3.weight" in differing
    assert len(differing) > 4


def test_trained_on_resumed_and_over_two_ranks(log: Path, source: Path, tmp_path: Path) -> None:
    """The same curve on two ranks, and the source may go once the run has begun."""
    chosen = derived(log, source, method="cce_helpers")
    alone = train(chosen, tmp_path / "alone", show_progress=False)
    assert alone.best["validation_bce"] < 0.69
    for process in on_ranks(tmp_path, 2, _train, chosen, tmp_path / "two"):
        assert process.code == 0, process.stderr
    kinds = ("train", "validation", "test")
    curves = [
        [record["bce"] for record in metrics(tmp_path / name) if record["kind"] in kinds] for name in ("alone", "two")
    ]
    np.testing.assert_allclose(*curves, atol=1e-6)
    evaluated = evaluate(chosen, tmp_path / "alone", chosen.data.test)
    assert evaluated.bce > 0
    assert result(tmp_path / "alone")["steps"] == alone.steps


def _train(chosen: RunConfig, folder: Path) -> None:
    train(chosen, folder, show_progress=False)


def test_a_clustered_source_and_another_cap(log: Path, tmp_path: Path) -> None:
    """More parameters before the clustering than after."""
    first = criteo_config(log, embedding={"max_parameters": 2 * CAP})
    train(first, tmp_path / "large", show_progress=False)
    chosen = derived(log, tmp_path / "large", method="cce")
    model = derived_model(chosen)
    ((_, collection),) = _collections(model)
    (large,) = (one for _, one in _collections(_load(tmp_path / "large", first)))
    tables = {table.name: table for table in large.embedding_bag_configs()}
    for table in collection.cce_configs():
        assert isinstance(table, CCEConfig)
        wanted = embeddings(large, tables[table.name])
        assert np.square(embeddings(collection, table) - wanted).mean() < 0.5 * wanted.var()
        assert collection.pointer_map(table.name).generation == 1


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"method": "ce_concat"}, r"table 'C1': method='ce_concat' has no learned pointers .* cce, cce_helpers, pq"),
        ({"method": "cce", "dim": 8, "max_parameters": 1600}, r"has other tables: C1, C2, C3 differ"),
        ({"method": "cce", "circular": True, "num_columns": 1}, r"table 'C1': .*circular clustering is of 2 columns"),
    ],
)
def test_what_cannot_be_derived(log: Path, source: Path, choices: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        derived_model(derived(log, source, **choices))


def test_no_run_to_derive_from(log: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config.json, so there is no run"):
        derived_model(derived(log, tmp_path / "nothing", method="pq"))
