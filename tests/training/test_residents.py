"""Runs with residents: on any number of ranks, interrupted anywhere, published, and what is refused."""

import itertools
import json
import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.support import runs
from tests.support.launch import Job, command
from tests.support.runs import assert_equal_metrics, assert_same_run, stop_after, train, train_on
from torchrec_cce import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig
from torchrec_cce.clustering.fold import TableFold
from torchrec_cce.errors import CCEError, ConfigError, DataFileError, MapFileError
from torchrec_cce.maps.bundle import read_folder
from torchrec_cce.maps.registry import MapVersion, Registry
from torchrec_cce.maps.residency import Residency
from torchrec_cce.maps.residency_files import read_residencies
from torchrec_cce.maps.snapshot import TableSnapshot
from torchrec_cce.maps.vocabulary import Vocabulary
from torchrec_cce.sharding.distributed_checkpoint import DistributedCheckpoint
from torchrec_cce.training import checkpoint, loop, run
from torchrec_cce.training.config import RunConfig, parse_config
from torchrec_cce.training.config_file import read_config, read_run_config
from torchrec_cce.training.input import num_dense, read_batches
from torchrec_cce.training.metrics import quality
from torchrec_cce.training.model import build_model

DTYPES = ("float32", "int8")


def config(log: Path, dtype: str = "float32", *, residents: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    """Phases from the start and from batch 8 on; from batch 16 on, the codewords are trained."""
    return runs.criteo_config(
        log,
        embedding={"method": "cce_residents", "max_parameters": runs.MAX_PARAMETERS, **changes.pop("embedding", {})},
        residents={"dtype": dtype, "learning_rate": 0.1, **(residents or {})},
        **changes,
    )


def residencies(run_dir: Path) -> dict[str, Residency]:
    """Those of the newest checkpoint."""
    (folder,) = runs.checkpoints(run_dir)[-1].glob("residents/*")
    return read_residencies(folder)


def assert_undisturbed(run_dir: Path, expected: Path) -> None:
    assert_same_run(run_dir, expected)
    found, wanted = residencies(run_dir), residencies(expected)
    assert sorted(found) == sorted(wanted) == ["C1", "C2"]
    for name, residency in wanted.items():
        np.testing.assert_array_equal(found[name].ages, residency.ages)
        assert (found[name].phases, found[name].is_open) == (residency.phases, residency.is_open) == (2, False)


# Ranks


@pytest.mark.parametrize(
    ("dtype", "residents", "changes"),
    [
        ("float32", {}, {}),
        ("int8", {"count_first": False, "fraction": 0.5}, {}),
        # So few IDs were seen that more codewords than 60 would have ties that a rounding decides.
        (
            "float32",
            {"count_first": False, "fraction": 0.5},
            {"optimizer": {"embedding": "adagrad"}, "embedding": {"max_parameters": 960}},
        ),
        ("int8", {}, {}),
    ],
)
def test_two_ranks_compute_what_one_does(
    log: Path, tmp_path: Path, dtype: str, residents: dict[str, Any], changes: dict[str, Any]
) -> None:
    chosen = config(log, dtype, residents=residents, **changes)
    one, two = (train_on(n, tmp_path / str(n), chosen) for n in (1, 2))
    assert sum(record["kind"] == "recluster" for record in one) == 4
    assert_equal_metrics(one, two, 1e-6)
    for name, residency in residencies(tmp_path / "1" / "run").items():
        assert np.array_equal(residency.ages, residencies(tmp_path / "2" / "run")[name].ages)


def test_rows_go_to_ids_as_they_come(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to be seen is to have no row; who has one keeps it to the end of the phase, also where a run goes on."""
    chosen = config(log, residents={"count_first": False, "fraction": 0.2})
    before: dict[str, Residency] = {}
    for number, batches in enumerate((1, 2, 1, 3)):
        stop_after(monkeypatch, batches)
        assert train(chosen, tmp_path / "run", resume=number > 0).interrupted
        after, (folder,) = residencies(tmp_path / "run"), runs.checkpoints(tmp_path / "run")[-1].glob("maps/*")
        for name, residency in after.items():
            seen = read_folder(folder)[1][name].frequencies > 0
            has_row = residency.ages == 0
            assert not (has_row & ~seen).any()
            assert has_row.sum() == min(seen.sum(), round(0.2 * residency.num_ids))
            if name in before:
                had = np.flatnonzero(before[name].ages == 0)
                np.testing.assert_array_equal(residency.slots.of(had), before[name].slots.of(had))
        assert number == 0 or any(after[name].slots.num_slots > before[name].slots.num_slots for name in after)
        before = after


# Interruptions


@pytest.mark.parametrize(
    ("dtype", "stops", "in_background", "count_first"),
    [
        ("float32", (3, 8), False, True),
        ("float32", (8, 12), True, True),
        ("int8", (11, 2), False, True),
        ("int8", (16,), True, True),
        ("float32", (1, 4), True, False),
        ("int8", (3, 2), False, False),
    ],
)
def test_interrupted_and_resumed(
    log: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    stops: tuple[int, ...],
    in_background: bool,
    count_first: bool,
) -> None:
    """In either phase, after the batch of a clustering, and where the codewords are trained; with a registry."""

    def of(name: str) -> RunConfig:
        training = {"batch_size": runs.BATCH_SIZE, "checkpoint_in_background": in_background}
        residents = {"count_first": True} if count_first else {"count_first": False, "newcomers": 0.3}
        return config(log, dtype, residents=residents, registry={"url": str(tmp_path / name)}, training=training)

    monkeypatch.setattr(loop, "_LOG_EVERY", 2)
    stop_after(monkeypatch, None)
    train(of("one"), tmp_path / "undisturbed")
    for number, batches in enumerate(stops):
        stop_after(monkeypatch, batches)
        assert train(of("two"), tmp_path / "run", resume=number > 0).interrupted
    stop_after(monkeypatch, None)
    assert train(of("two"), tmp_path / "run", resume=True).steps == runs.BATCHES + 1
    assert_undisturbed(tmp_path / "run", tmp_path / "undisturbed")


def train_and_die(chosen: RunConfig, run_dir: Path, moment: str, resume: bool) -> None:
    """Train to the second time that this moment comes, and end by SIGKILL."""
    calls = itertools.count(1)

    def dying(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            found = function(*arguments, **options)
            if next(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return call

    owner: Any
    owner, name = {
        "folding": (TableFold, "assign"),
        "folded": (loop, "recluster_sharded"),
        "admitted": (run, "admit_sharded"),
        "topped up": (run, "top_up_sharded"),
        "saving": (checkpoint, "write_residencies"),
    }[moment]
    with mock.patch.object(owner, name, dying(getattr(owner, name))):
        runs.train_and_log_every_batch(chosen, run_dir, resume)


@pytest.mark.parametrize(
    ("dtype", "moments", "count_first"),
    [
        ("float32", ("folding", "saving"), True),
        ("int8", ("admitted", "folded"), True),
        ("float32", ("topped up",), False),
    ],
)
def test_killed_where_residents_change(
    log: Path, tmp_path: Path, dtype: str, moments: tuple[str, ...], count_first: bool
) -> None:
    """Each kill comes after a checkpoint, which is gone on from."""
    training = {"batch_size": runs.BATCH_SIZE, "checkpoint_every": 3 if count_first else 1}
    chosen = config(log, dtype, residents={"count_first": count_first}, training=training)
    expected = Job(tmp_path / "undisturbed", runs.train_and_log_every_batch, chosen, tmp_path / "expected")
    for number, moment in enumerate(moments):
        job = Job(tmp_path / moment, train_and_die, chosen, tmp_path / "run", moment, number > 0)
        assert job.wait().code == -signal.SIGKILL
        assert len(runs.checkpoints(tmp_path / "run")) == 1
    assert expected.wait().code == 0
    train_on(1, tmp_path, chosen, resume=True)
    assert_undisturbed(tmp_path / "run", tmp_path / "expected")


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", DTYPES)
def test_killed_at_random_moments(log: Path, tmp_path: Path, dtype: str) -> None:
    chosen = config(
        log, dtype, training={"batch_size": runs.BATCH_SIZE, "checkpoint_every": 1, "epochs": 2}, recluster={"cf": 20}
    )
    finished = Job(tmp_path / "job", runs.train_and_log_every_batch, chosen, tmp_path / "expected").wait()
    assert finished.code == 0, finished.stderr
    run_dir, delays, last = tmp_path / "run", np.random.default_rng(0), 0

    def step() -> int:
        return max((int(path.name.removeprefix("step-")) for path in runs.checkpoints(run_dir)), default=0)

    for kill in range(6):
        job = Job(tmp_path / str(kill), runs.train_and_log_every_batch, chosen, run_dir, kill > 0)
        job.wait_for(lambda: step() > last)  # noqa: B023
        time.sleep(delays.uniform(0, 0.3))
        os.kill(job.pid, signal.SIGKILL)
        assert job.wait().code == -signal.SIGKILL
        last = step()
    train_on(1, tmp_path, chosen, resume=True)
    assert_undisturbed(run_dir, tmp_path / "expected")


# Checkpoints that are damaged


@pytest.fixture(scope="module")
def interrupted(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in its second phase; no test may change it."""
    run_dir = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_after(monkeypatch, 11)
        train(config(log), run_dir)
    assert all(residency.is_open and residency.phases == 2 for residency in residencies(run_dir).values())
    return run_dir


@pytest.mark.parametrize("file", ["0000.ages.arrow", "0001.ages.arrow", "residents.json"])
def test_a_damaged_file_of_residents_is_named(interrupted: Path, file: str) -> None:
    (folder,) = runs.checkpoints(interrupted)[-1].glob("residents/*")
    path = folder / file
    content = path.read_bytes()
    flipped = [bytearray(content) for _ in range(3)]
    for damaged, share in zip(flipped, (0.05, 0.5, 0.95), strict=True):
        damaged[int(len(content) * share)] ^= 4
    try:
        for bad in (*map(bytes, flipped), content[:-10], b"", None):
            path.unlink()
            if bad is not None:
                path.write_bytes(bad)
            error = error_of(interrupted)
            assert isinstance(error, DataFileError | MapFileError)
            assert str(path) in str(error)
    finally:
        path.write_bytes(content)


def error_of(run_dir: Path) -> CCEError:
    chosen = read_run_config(run_dir)
    assert chosen.data.test is not None
    with pytest.raises(CCEError) as evaluated:
        loop.evaluate(chosen, run_dir, chosen.data.test)
    with pytest.raises(CCEError) as resumed:
        train(chosen, run_dir, resume=True)
    assert str(resumed.value) == str(evaluated.value)
    return resumed.value


def test_pointers_of_4_bits_change_their_bytes_and_nothing_else(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the run is interrupted in its second phase, after a fold."""

    def of(bits: int) -> RunConfig:
        embedding = {"max_parameters": 16 * 16, "full_up_to": 50, "min_pointer_bits": bits}
        return runs.changed(config(log).as_dict(), {"embedding": embedding})

    plain = train(of(8), tmp_path / "plain")
    small = train(of(4), tmp_path / "small")
    assert (small.sizes.pointer_bytes, plain.sizes.pointer_bytes) == (1800 * 2, 1800 * 4)
    assert small.sizes.total_bytes == plain.sizes.total_bytes - 1800 * 2
    assert runs.metrics(tmp_path / "small") == runs.metrics(tmp_path / "plain")
    stop_after(monkeypatch, 11)
    assert train(of(4), tmp_path / "stopped").interrupted
    stop_after(monkeypatch, None)
    train(of(4), tmp_path / "stopped", resume=True)
    assert_undisturbed(tmp_path / "stopped", tmp_path / "small")


# Versions


def embeddings_of(table: TableSnapshot) -> npt.NDArray[np.float32]:
    """[n, d], read from the pointers and the codewords alone."""
    pointers = np.array(table.pointer_map.pointers.to_pylist())
    num_columns = pointers.shape[1]
    assert table.weights is not None
    codewords = np.array(table.weights).reshape(num_columns, 2, table.pointer_map.num_rows, -1)
    assert not codewords[:, 1].any(), "there is no helper"
    return np.concatenate([codewords[column, 0][pointers[:, column]] for column in range(num_columns)], axis=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_version_is_all_that_the_quality_after_a_clustering_needs(log: Path, tmp_path: Path, dtype: str) -> None:
    """The run ends at its last clustering, so that its checkpoint has the weights above the embeddings."""
    recluster = {**runs.CLUSTERINGS, "rest": 0}
    chosen = config(log, dtype, registry={"url": str(tmp_path / "registry")}, recluster=recluster)
    done = train(chosen, tmp_path / "run")
    records = runs.metrics(tmp_path / "run")
    assert [(r["step"], r["version"]) for r in records if r["kind"] == "publish"] == [(8, 1), (16, 2)]
    folds = [r for r in records if r["kind"] == "recluster"]
    assert [(r["table"], r["residents"]) for r in folds] == [("C1", 250), ("C2", 200)] * 2
    assert all(0 <= r["relative_error"] == r["sample_errors"]["new"] / r["sample_errors"]["total"] < 1 for r in folds)
    measured = [r for r in records if r["kind"] in ("validation", "test") and r["step"] == done.steps == 16]
    assert measured
    registry = Registry(tmp_path / "registry", cache=tmp_path / "cache")
    assert registry.verify() == []
    names = {path.name for path in (tmp_path / "registry" / "versions").rglob("*") if path.is_file()}
    assert not [name for name in names if "ages" in name or "resident" in name]
    for record in measured:
        split = {"validation": chosen.data.validation, "test": chosen.data.test}[record["kind"]]
        found = quality(*predicted(registry.open(), chosen, split, tmp_path / "run"))
        assert (found.bce, found.auc) == pytest.approx((record["bce"], record["auc"]), rel=0, abs=1e-6)


def predicted(opened: MapVersion, chosen: RunConfig, split: Any, run_dir: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels on a split, of a model of full tables that has the version's embeddings."""
    plain = runs.changed(chosen.as_dict(), {"embedding": {"method": "full"}, "residents": None, "registry": {}})
    model = build_model(plain, num_dense=num_dense(plain), device=torch.device("cpu"))
    collection = next(name for name, _ in model.named_modules() if name.endswith("embedding_bag_collection"))
    tables = {f"{collection}.ebc.embedding_bags.{name}.weight": table for name, table in opened.tables.items()}
    weights = model.state_dict()
    rest = {f"model.{name}": value for name, value in weights.items() if name not in tables and "_extra" not in name}
    DistributedCheckpoint(folder=runs.checkpoints(run_dir)[-1]).fill(rest)
    for name, table in tables.items():
        weights[name] = torch.from_numpy(embeddings_of(table))
    model.load_state_dict(weights)
    (remap,) = (module.remap for module in model.modules() if hasattr(module, "remap"))
    with torch.no_grad():
        outputs = [
            torch.stack([model(batch.part), batch.part.labels])[:, : batch.rows]
            for batch in read_batches(plain, split, remap=remap, rank=0, world_size=1)
        ]
    logits, labels = torch.cat(outputs, dim=1)
    return logits, labels


def learned_elsewhere(chosen: RunConfig, *, seed: int, keys: npt.NDArray[np.int64]) -> dict[str, TableSnapshot]:
    """Tables of a vocabulary that another job has made for the model of a run, by a fold of its own."""
    torch.manual_seed(seed)
    collection = CCEEmbeddingBagCollection(tables=chosen.table_configs())
    for name in ("C1", "C2"):
        grown = collection.pointer_map(name).with_vocabulary(Vocabulary.build(keys.copy(), num_threads=1))
        collection.attach_pointer_map(name, grown)
    collection.admit(seed=seed)
    for rows in collection.residents.parameters():  # type: ignore[union-attr]
        torch.nn.init.normal_(rows)
    return collection.snapshot(collection.recluster(seed=seed))


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_run_moves_to_a_version_of_more_ids_in_the_middle_of_a_phase(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Started from one, and interrupted at the move and after; its own folds come later and know all IDs."""
    for name, stops in (("expected", [None]), ("run", [3, 2, None])):
        url = str(tmp_path / f"{name}-registry")
        chosen = config(
            log, dtype, registry={"url": url, "start": 1, "watch_every": 1}, residents={"count_first": False}
        )
        registry = Registry(url, cache=tmp_path / "cache")
        for seed, keys in enumerate((np.arange(300), np.arange(700)[::-1])):
            registry.publish(learned_elsewhere(config(log), seed=seed, keys=keys))
        for number, step in enumerate(stops):
            stop_after(monkeypatch, step)
            train(chosen, tmp_path / name, resume=number > 0)
            if step == 2:  # after that of the move
                in_phase = residencies(tmp_path / name)
    assert_undisturbed(tmp_path / "run", tmp_path / "expected")
    for residency in in_phase.values():
        assert (residency.num_ids, residency.phases, residency.is_open) == (700, 1, True)
        assert residency.slots.num_slots > 100
    records = runs.metrics(tmp_path / "run")
    assert {(r["step"], r["version"]) for r in records if r["kind"] == "swap"} == {(3, 2)}
    assert [r["version"] for r in records if r["kind"] == "publish"] == [3, 4]
    for table in registry.open().tables.values():
        assert table.pointer_map.num_ids == 700


# Configuration and commands

GOOD = """\
[data]
format = "criteo"
train.path = "train.tsv"

[tables]
C1 = 1000

[embedding]
method = "cce_residents"
max_parameters = 800

[recluster]
ct = 2
cf = 10

[residents]
fraction = 0.25
dtype = "float32"

[registry]
url = "registry"
"""


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_a_budget_of_bytes_is_what_residents_of_all_tables_take(log: Path, dtype: str) -> None:
    def with_residents(max_bytes: int) -> list[CCEEmbeddingBagConfig]:
        tables = config(log, dtype, residents={"max_bytes": max_bytes}).table_configs()
        return [table for table in tables if isinstance(table, CCEEmbeddingBagConfig)]

    assert len(with_residents(20_000)) > 1
    assert sum(table.resident_bytes for table in with_residents(20_000)) == pytest.approx(20_000, rel=0.02)
    assert all(table.max_residents == table.num_embeddings for table in with_residents(10**9))


@pytest.mark.parametrize(
    ("old", "new", "line", "what"),
    [
        ("ct = 2", "ct = 0", 13, "recluster.ct: ct=0 must be at least 1 for embedding.method='cce_residents'"),
        ("cf = 10", 'cf = 10\nhelper_init = "residual"', 15, "recluster.helper_init: helper_init='residual' is not"),
        ("cf = 10", 'cf = 10\nhelper = "zero"', 15, "recluster.helper: unknown key; allowed: ct, cf, "),
        ('"cce_residents"', '"cce"', 9, "embedding.method: residents are for embedding.method='cce_residents'; it is"),
        ("fraction = 0.25", "fraction = 0.0", 17, "residents.fraction: Input should be greater than 0"),
        ("fraction = 0.25", "fraction = 1.5", 17, "residents.fraction: Input should be less than or equal to 1"),
        ('"float32"', '"int4"', 18, "residents.dtype: Input should be 'float32', 'float16' or 'int8'; found"),
        ("fraction = 0.25", "learning_rate = 0", 17, "residents.learning_rate: Input should be greater than 0"),
        ("fraction = 0.25", "share = 0.25", 17, "residents.share: unknown key; allowed: fraction, max_bytes, "),
        ("fraction = 0.25", "max_bytes = 100", 17, "residents.max_bytes: max_bytes=100 leaves nothing for rows"),
        ("fraction = 0.25", "newcomers = 0.1", 17, "residents.newcomers: newcomers=0.1 needs count_first=false"),
        ('"criteo"', '"remapped"', 13, "recluster.ct: ct=2: remapped data has the pointers of one version"),
        ("max_parameters = 800", "use_helper = false", 10, "embedding.use_helper: use_helper=false is for method="),
    ],
)
def test_a_bad_line(tmp_path: Path, old: str, new: str, line: int, what: str) -> None:
    assert old in GOOD
    path = tmp_path / "run.toml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ConfigError) as raised:
        read_config(path)
    assert str(raised.value).startswith(f"{path}:{line}: {what}")
    assert "\n" not in str(raised.value)


def test_residents_are_as_usual_where_no_section_describes_them(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(GOOD.replace('[residents]\nfraction = 0.25\ndtype = "float32"\n', ""))
    (table,) = read_config(tmp_path / "run.toml").table_configs()
    assert table.max_residents == 250  # type: ignore[attr-defined]
    assert table.residents.learning_rate == 0.05  # type: ignore[attr-defined]


def test_what_older_runs_did_not_know_is_not_in_their_digests(log: Path) -> None:
    usual = config(log)
    assert not {"max_bytes", "newcomers"} & usual.as_dict()["residents"].keys()
    for section in ({"max_bytes": 20_000}, {"count_first": False, "newcomers": 0.1}):
        changed = config(log, residents=section)
        assert parse_config(changed.as_dict()) == changed
        assert section.items() <= changed.as_dict()["residents"].items()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_plan_has_the_rows_that_torchrec_places(log: Path, tmp_path: Path, dtype: str) -> None:
    toml = runs.write_toml(tmp_path / "run.toml", config(log, dtype))
    finished = command(tmp_path / "process", "plan", toml, "--world-size", "2", "--json").wait()
    assert finished.code == 0, finished.stderr
    tables = {each["table"]: each for each in json.loads(finished.stdout)["plans"]["cce_residents"]["tables"]}
    rows = {f"residents.{name}_residents" for name in ("C1", "C2")} if dtype == "float32" else set()
    assert set(tables) == {"codewords.C1", "codewords.C2", "ebc.C3", *rows}
    replicas = 0 if dtype == "float32" else 2 * 250 * (16 + 4)  # of both ranks of the host
    assert tables["codewords.C1"]["host_bytes"] == 1000 * 4 + 1000 + 16 * 12 + replicas
    (table, *_) = config(log, dtype, residents={"count_first": False}).table_configs()
    assert table.residency_bytes == 1000 + 16 * 12 + 250 * 4  # type: ignore[attr-defined]


def test_a_run_in_a_phase_is_published_without_its_rows(interrupted: Path, tmp_path: Path) -> None:
    """The codewords of the last clustering, which are frozen."""
    arguments = ("maps", "publish", "--run-dir", interrupted, "--registry", tmp_path / "registry")
    finished = command(tmp_path / "process", *arguments).wait()
    assert finished.code == 0, finished.stderr
    opened = Registry(tmp_path / "registry", cache=tmp_path / "cache").open()
    for table in opened.tables.values():
        assert table.pointer_map.generation == 1
        assert embeddings_of(table).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_run_may_start_from_the_embeddings_of_another(log: Path, tmp_path: Path, dtype: str) -> None:
    full = runs.criteo_config(log, embedding={"method": "full", "max_parameters": None}, recluster={"ct": 0})
    train(full, tmp_path / "full")
    chosen = config(log, dtype, derive={"run": str(tmp_path / "full")}, recluster={"ct": 1})
    assert train(chosen, tmp_path / "run").steps == runs.BATCHES + 1
