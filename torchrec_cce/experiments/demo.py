"""`torchrec-cce demo`: five methods on one click log, made for the occasion or the user's own, with a report."""

import platform
import shutil
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from torchrec_cce.data.criteo import read_criteo
from torchrec_cce.data.parquet import parquet_files, read_parquet
from torchrec_cce.data.rows import Rows
from torchrec_cce.data.tsv import DENSE_FEATURES
from torchrec_cce.errors import ConfigError, DataFileError
from torchrec_cce.experiments.comparison import comparison_report
from torchrec_cce.experiments.dense_ids import write_dense
from torchrec_cce.experiments.plan import MethodEntry, Plan
from torchrec_cce.experiments.planted_log import write_click_log
from torchrec_cce.experiments.report import write_report
from torchrec_cce.experiments.results import RUNS, TrialResult, chosen_results
from torchrec_cce.experiments.runner import bench
from torchrec_cce.methods.registry import Method
from torchrec_cce.training.config import RunConfig, can_name_a_table, parse_config

DEMO_METHODS: tuple[Method, ...] = ("full", "hashing_trick", "ce_concat", "cce")
_MARK = ".torchrec-cce-demo"
_BATCH_SIZE = 1024
_SHARES = (0.8, 0.1)  # train and validation; the rest is for testing


def run_demo(
    folder: Path,
    *,
    data: Path | None,
    label: str,
    ignore: Sequence[str],
    max_rows: int,
    max_parameters: int | None,
    seed: int,
) -> tuple[list[TrialResult], dict[str, str]]:
    """Train full tables, the hashing trick, CE concat, CCE and CCE with residents; `folder` gets `report.json` and
    `report.html`.

    Args:
        data: a Criteo TSV (plain or .gz) or Parquet; None makes a log in Criteo's layout with planted clusters.
        label: the field of clicks in Parquet. Floating-point fields are dense features, integers and lists are IDs.
        ignore: fields of Parquet that are neither, e.g. a time.
        max_rows: the first rows of `data` that are used, or the rows that are made.
        max_parameters: the cap for each table; None for a 40th of what the largest full table has.
        seed: of the log, the weights and the clusterings.

    Returns:
        The results, and facts about the comparison.

    Raises:
        ConfigError: `folder` is neither empty nor of an older demo, or `data` lies in it.
        DataFileError: `data` cannot be read.
    """
    if data is not None and not data.exists():
        raise DataFileError(f"{data}: no such file or folder")
    if data is not None and folder.resolve() in data.resolve().parents:
        raise ConfigError(f"{data} is in {folder}, which is cleared for the demo; choose another folder")
    _clear(folder)
    about = {"log": str(data) if data else "made for this run, with planted clusters (the best possible AUC is below)"}
    if data is None:
        data = folder / "clicks.tsv"
        truth = write_click_log(data, num_rows=max_rows, seed=seed)
        about["best possible AUC"] = f"{truth.bayes_auc:.4f}, from the true click probabilities"
    base, num_rows = prepare(folder / "data", data, label=label, ignore=ignore, max_rows=max_rows)
    max_parameters = max_parameters or max(base.universes().values()) * base.embedding.dim // 40
    plan = Plan(
        run=base,
        methods=(*(MethodEntry(method=method) for method in DEMO_METHODS), _residents(base, num_rows)),
        caps=(max_parameters,),
        seeds=(seed,),
        learning_rates=(base.optimizer.embedding_learning_rate,),
    )
    results = chosen_results(bench(plan, folder, keep_checkpoints=True))
    about |= {
        "rows": f"{num_rows:,}, one epoch over the first 80 %, tested on the last 10 %",
        "ID columns": ", ".join(base.universes()),
        "cap": f"{max_parameters:,} trained parameters a table; smaller tables stay full",
        "versions": ", ".join(
            f"{name} {version(name)}" for name in ("torchrec-cce", "torch", "torchrec", "fbgemm-gpu")
        ),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
    }
    title = "CCE, with and without residents, against full tables, the hashing trick and CE concat"
    write_report(folder, comparison_report(results, title=title, about=about, runs=folder / RUNS))
    return results, about


def _residents(base: RunConfig, num_rows: int) -> MethodEntry:
    """One long phase for the most frequent half of the IDs, whose rows are folded after the last whole batch."""
    batches = int(num_rows * _SHARES[0]) / _BATCH_SIZE
    num_columns = min(base.embedding.dim, 8)
    return MethodEntry(
        method="cce_residents",
        num_columns=num_columns,
        recluster={"ct": 1, "cf": max(1, int(batches))},
        residents={"fraction": 0.5},
    )


def _clear(folder: Path) -> None:
    """Make `folder` an empty one for a demo. Only what a demo made is removed."""
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / _MARK).exists():
            raise ConfigError(f"{folder} is not empty and not of an older demo; choose another folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARK).touch()


def prepare(
    folder: Path, data: Path, *, label: str, ignore: Sequence[str] = (), max_rows: int
) -> tuple[RunConfig, int]:
    """Number the raw IDs of `data` from 0, so that tables have as many rows as there are IDs, and split it."""
    parquet = data.is_dir() or data.suffix == ".parquet"
    fields = (
        _parquet_fields(data, {label, *ignore}) if parquet else _Fields(dense=list(DENSE_FEATURES), ids=[], lists=[])
    )
    read = (
        partial(read_parquet, data, label=label, ids={name: name for name in fields.ids}, dense=fields.dense)
        if parquet
        else partial(read_criteo, data)
    )
    num_rows = sum(len(rows) for rows in read(max_rows=max_rows))
    if num_rows < 100:
        raise ConfigError(f"{data} has {num_rows} rows; a comparison needs at least 100")
    ends = [0, *(int(num_rows * sum(_SHARES[:i])) for i in (1, 2)), num_rows]
    splits = ["train", "validation", "test"]

    def rows_of(start: int, stop: int) -> Iterator[Rows]:
        return read(skip_rows=start, max_rows=stop - start)

    folder.mkdir(parents=True)
    paths = {split: folder / f"{split}.parquet" for split in splits}
    encoder = write_dense(
        {paths[split]: partial(rows_of, *stretch) for split, stretch in zip(splits, pairwise(ends), strict=True)},
        dense=fields.dense,
        multi_hot=fields.lists,
    )
    steps = -(-ends[1] // _BATCH_SIZE)
    config = parse_config(
        {
            "data": {
                "format": "parquet",
                "dense": fields.dense,
                **{split: {"path": str(path)} for split, path in paths.items()},
            },
            "tables": {
                name if can_name_a_table(name) else f"table_{i}": {"num_embeddings": max(1, n), "features": [name]}
                for i, (name, n) in enumerate(encoder.num_embeddings.items())
            },
            "recluster": {"ct": 2, "cf": max(1, steps // 4)},
            "training": {"batch_size": _BATCH_SIZE, "evaluate_every": max(1, steps // 8)},
        }
    )
    return config, num_rows


class _Fields(NamedTuple):
    """What the fields of a log are."""

    dense: list[str]
    ids: list[str]
    lists: list[str]
    """Those of `ids` that hold bags of any number of IDs."""


def _parquet_fields(data: Path, ignore: Collection[str]) -> _Fields:
    """By their types: floating-point numbers are dense features, integers and lists of them are IDs."""
    fields = _Fields(dense=[], ids=[], lists=[])
    for field in pq.read_schema(parquet_files(data)[0]):
        kind = field.type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if is_list or pa.types.is_dictionary(kind):
            kind = kind.value_type
        if field.name in ignore:
            continue
        if pa.types.is_integer(kind):
            fields.ids.append(field.name)
            if is_list:
                fields.lists.append(field.name)
        elif pa.types.is_floating(kind) and not is_list:
            fields.dense.append(field.name)
    return fields
