"""The job clusters as training does, and publishes one version."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from tests.support import nights, runs
from tests.support.nights import EASY, Night, assert_same_tensors, is_of_table, newest, tensors
from tests.support.snapshots import assert_same
from torchrec_cce.errors import ClusteringError, ConfigError, PublishConflictError
from torchrec_cce.jobs.checkpoint import copy as checkpoint_copy
from torchrec_cce.jobs.checkpoint.reader import CCECheckpoint
from torchrec_cce.jobs.recluster.request import foresee
from torchrec_cce.jobs.recluster.summary import RECORD
from torchrec_cce.sharding.digests import renew_digests
from torchrec_cce.sharding.recluster import recluster_sharded
from torchrec_cce.sharding.tables import ShardedStore
from torchrec_cce.training import loop
from torchrec_cce.training.config_file import read_run_config
from torchrec_cce.training.parallel import process_group
from torchrec_cce.training.versions import snapshot_of_run

STRICT = replace(EASY, min_h1=1.5)


def test_the_bits_of_a_clustering_in_training(night: Night) -> None:
    """Weights, states and maps, weighed by frequencies; and training goes on to the end."""
    assert_bits_of_training(night)
    config = read_run_config(night.run)
    assert {r["step"] for r in runs.metrics(night.output)} <= set(range(nights.STOPPED + 1))
    result = loop.train(config, night.output, start="resume", show_progress=False)
    assert result.steps == runs.BATCHES + 1
    assert [r["step"] for r in runs.metrics(night.output) if r["kind"] == "recluster"] == [8, 8, 16, 16]


def test_the_bits_of_a_clustering_in_training_without_helper(tmp_path: Path) -> None:
    embedding = {"max_parameters": runs.MAX_PARAMETERS, "use_helper": False}
    (tmp_path / "trained").mkdir()
    trained = nights.train_a_run(tmp_path / "trained", embedding=embedding)
    (tmp_path / "night").mkdir()
    assert_bits_of_training(Night(tmp_path / "night", trained, thresholds=EASY))


def assert_bits_of_training(night: Night) -> None:
    summary = night.recluster().summary
    assert (summary.status, summary.parent, summary.version) == ("published", 1, 2)
    with process_group() as ranks:
        config = read_run_config(night.run)
        run = loop.Run(config, night.run, ranks)
        frequencies = run.load()
        reports = recluster_sharded(
            run.model,
            run.optimizer,
            seed=config.seed,
            frequencies=frequencies,
            settings=config.recluster.settings(),
        )
        (collection,) = run.collections
        weights, states = run.model.state_dict(), run.optimizer.state_dict()["state"]
        made = CCECheckpoint.at(night.output)
        for table in made.tables(night.registry):
            rows = made.read_rows(table)
            expected = ShardedStore(
                weights[table.weight.removeprefix("model.")], states[table.weight.removeprefix("model.")]
            ).read()
            np.testing.assert_array_equal(rows.weights, expected.weights)
            assert rows.states.keys() == expected.states.keys()
            for name, state in rows.states.items():
                np.testing.assert_array_equal(state, expected.states[name])
            assert table.snapshot.pointer_map.digest == collection.pointer_map(table.name).digest
        for figures in summary.tables:
            report = reports[figures.table]
            assert (figures.entropies, figures.churn) == (report.entropies, report.share_changed)


def test_what_is_published(night: Night) -> None:
    summary = night.recluster().summary
    opened = night.registry.open()
    assert (opened.version, opened.entry.parent) == (2, 1)
    assert opened.manifest.provenance.checkpoint == str(newest(night.run))
    assert night.registry.manifest(1).provenance.config_digest == opened.manifest.provenance.config_digest
    counted = nights.frequencies(newest(night.run))
    published = snapshot_of_run(night.output).tables
    for figures in summary.tables:
        table = opened.tables[figures.table]
        assert_same(table, replace(published[figures.table], objective=table.objective))
        assert table.frequencies is not None
        np.testing.assert_array_equal(table.frequencies, counted[figures.table])
        assert figures.unseen == pytest.approx(np.mean(counted[figures.table] == 0))
        assert opened.manifest.tables[figures.table].churn == pytest.approx(figures.churn)
        assert table.objective is not None
    (stamps,) = CCECheckpoint.at(night.output).stamps.values()
    assert {stamp.version for stamp in stamps} == {2}
    assert not list(night.folder.glob(".*"))


def test_the_next_night(night: Night) -> None:
    """From the output, trained on: its weights no longer say their version, but their maps are those of it."""
    night.recluster()
    stops = [False, False, True]
    with mock.patch.object(loop.StopRequest, "on_any_rank", side_effect=stops):
        loop.train(read_run_config(night.output), night.output, start="resume", show_progress=False)
    summary = night.recluster(checkpoint=night.output, output=night.folder / "second").summary
    assert (summary.parent, summary.version) == (2, 3)
    assert [table.generation for table in summary.tables] == [3, 3]
    assert not list((night.folder / "second").rglob("__recluster_1*")), "training has written the file anew"


def test_frequencies_of_a_file(night: Night) -> None:
    sizes = {"C1": 1000}
    archive = nights.counts(night.folder, sizes)
    summary = night.recluster(frequencies=archive).summary
    assert [table.unseen is None for table in summary.tables] == [False, True]
    frequencies = night.registry.open().tables["C1"].frequencies
    np.testing.assert_array_equal(frequencies, np.load(archive)["C1"])
    kept, trained = nights.frequencies(newest(night.output)), nights.frequencies(newest(night.run))
    assert kept.keys() == {"C1", "C2"}
    for name, each in kept.items():
        np.testing.assert_array_equal(each, trained[name])


@pytest.mark.parametrize(
    ("sizes", "dtype", "message"),
    [
        ({"C9": 10}, np.int64, r"frequencies of \['C9'\]; the CCE tables are \['C1', 'C2'\]"),
        ({"C1": 10}, np.int64, r"'C1' are int64 \[10\], not int64 \[1000\]"),
        ({"C1": 1000}, np.float32, r"'C1' are float32 \[1000\], not int64 \[1000\]"),
    ],
)
def test_frequencies_that_do_not_fit(night: Night, sizes: dict[str, int], dtype: Any, message: str) -> None:
    archive = nights.counts(night.folder, sizes, dtype)
    with pytest.raises(ConfigError, match=message):
        night.recluster(frequencies=archive)
    night.assert_untouched()


def test_frequencies_that_are_none(night: Night) -> None:
    (night.folder / "counts.npz").write_text("none")
    with pytest.raises(ConfigError, match=r"not an \.npz archive of frequencies"):
        night.recluster(frequencies=night.folder / "counts.npz")
    night.assert_untouched()


def test_a_closed_gate_and_force(night: Night) -> None:
    done = night.recluster(thresholds=STRICT)
    assert (done.summary.status, done.summary.version) == ("refused", None)
    assert {gate.threshold for gate in done.summary.closed} == {"min_h1"}
    assert done.cluster_sizes["C1"].sum(axis=1).tolist() == [1000] * 4
    night.assert_untouched()

    summary = night.recluster(thresholds=STRICT, force=True).summary
    assert (summary.status, summary.version, summary.forced) == ("published", 2, True)
    assert json.loads((night.output / RECORD).read_text())["forced"]


def test_validation_closes_a_gate(night: Night, trained: Path) -> None:
    log = trained.parent / "log.tsv"
    summary = night.recluster(validation=log, thresholds=replace(EASY, max_bce_ratio=0.5)).summary
    assert summary.status == "refused"
    assert {gate.threshold for gate in summary.closed} == {"max_bce_ratio"}
    night.assert_untouched()
    assert summary.before is not None
    assert (
        summary.before.bce == loop.evaluate(read_run_config(night.run), night.run, loop.SplitConfig(path=str(log))).bce
    )

    summary = night.recluster(validation=log, thresholds=EASY).summary
    assert summary.after is not None
    assert (
        summary.after.bce
        == loop.evaluate(read_run_config(night.output), night.output, loop.SplitConfig(path=str(log))).bce
    )


def test_done_already(night: Night) -> None:
    first = night.recluster().summary
    before = {path: path.stat().st_mtime_ns for path in night.output.rglob("*")}
    again = night.recluster().summary
    assert (again.status, again.version, again.tables) == ("there already", 2, first.tables)
    assert night.versions == [1, 2]
    assert before == {path: path.stat().st_mtime_ns for path in night.output.rglob("*")}
    with pytest.raises(ConfigError, match="is there already, of other content"):
        night.recluster(seed=99)
    with pytest.raises(ConfigError, match="is there already, of other content"):
        night.recluster(output=night.run)


def test_an_output_in_its_input(night: Night) -> None:
    with pytest.raises(ConfigError, match="is inside the checkpoint"):
        night.recluster(output=night.run / "next")
    assert not (night.run / "next").exists()


def test_it_finishes_what_it_had_published(night: Night) -> None:
    """Killed between the two, and started again, with gates that would be closed now."""
    night.recluster()
    done = shutil.move(night.output, night.folder / "done")
    summary = night.recluster(thresholds=STRICT).summary
    assert (summary.status, summary.parent, summary.version) == ("finished", 1, 2)
    assert night.versions == [1, 2]
    assert_same_tensors(newest(night.output), newest(Path(done)))
    shutil.rmtree(night.output)
    with pytest.raises(PublishConflictError, match=r"version 2 .* was made from the same checkpoint in another way"):
        night.recluster(seed=99)
    assert not night.output.exists()


def test_not_a_number(night: Night) -> None:
    found = CCECheckpoint.at(night.run)
    table = found.tables(night.registry)[1]
    rows = found.read_rows(table)
    rows.weights[3, 0] = np.nan
    checkpoint_copy._replace_tensors(found, {table.weight: torch.from_numpy(rows.weights)})
    renew_digests(found.folder)
    with pytest.raises(ClusteringError, match="table 'C2'"):
        night.recluster()
    night.assert_untouched()


def test_what_it_would_take(night: Night) -> None:
    before = {path for path in night.folder.rglob("*") if "cache" not in path.parts}
    forecast = foresee(night.job)
    assert (forecast.parent, forecast.num_ids) == (1, {"C1": 1000, "C2": 800})
    assert forecast.thresholds == EASY
    assert json.loads(forecast.to_json())["clustering"]["stages"]["k-means"]["tasks"] == 8
    assert before == {path for path in night.folder.rglob("*") if "cache" not in path.parts}
    sizes = forecast.disk
    night.recluster()
    made = sum(path.stat().st_size for path in newest(night.output).rglob("*") if path.is_file())
    assert 0.8 * made <= sizes.output <= 1.3 * made
    version = next(one for one in night.registry.state().versions if one.version == 2)
    assert 0.5 * version.num_bytes <= sizes.registry <= 1.3 * version.num_bytes


def test_only_the_tables_change(night: Night) -> None:
    night.recluster()
    before, after = tensors(newest(night.run)), tensors(newest(night.output))
    assert {key for key in before if not torch.equal(before[key], after[key])} == set(filter(is_of_table, before))
