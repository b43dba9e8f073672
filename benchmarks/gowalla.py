"""The whole curve on Gowalla, beside a plain implementation of the method.

Run it by `python -m benchmarks.gowalla --out FOLDER`. Both read the same files in the same order, with the same
optimizers, schedule and learning rates to choose from. The folder keeps what was run, so that a benchmark that was
interrupted goes on.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.figure import report
from benchmarks.logs import DATA, LOGS, PLANS
from benchmarks.plain_cce import Settings, train_plain
from benchmarks.reduced import reduced
from torchrec_cce.experiments.curve import SeedGroup, seed_groups
from torchrec_cce.experiments.plan import Plan, read_plan
from torchrec_cce.experiments.results import chosen_results
from torchrec_cce.experiments.runner import bench
from torchrec_cce.files.atomic import write_json
from torchrec_cce.training.command import quiet_libraries
from torchrec_cce.training.metrics import Quality
from torchrec_cce.workers.local import LocalEngine

LOG = LOGS["gowalla_all"]
OURS = "cce, 4 columns"
COLUMNS = 4
FOLDER = Path("runs/bench-gowalla")


def run_plain(plan: Plan, folder: Path, *, workers: int) -> dict[int, list[Quality]]:
    """Cap → the quality on the test split from each seed, at the rate that is best on validation from the first."""
    first, *others = plan.seeds
    caps = plan.caps or ()
    with LocalEngine(workers) as engine:

        def all_of(wanted: Sequence[Settings]) -> dict[Settings, tuple[Quality, Quality]]:
            return dict(engine.run(partial(_train_once, plan, folder), wanted))

        tuning = {cap: [_settings(plan, cap, rate, first) for rate in plan.learning_rates] for cap in caps}
        found = all_of([settings for tried in tuning.values() for settings in tried])
        best = {cap: min(tried, key=lambda settings: found[settings][0].bce) for cap, tried in tuning.items()}
        found |= all_of([replace(settings, seed=seed) for settings in best.values() for seed in others])
    return {cap: [found[replace(settings, seed=seed)][1] for seed in plan.seeds] for cap, settings in best.items()}


def _settings(plan: Plan, cap: int, rate: float, seed: int) -> Settings:
    run = plan.run
    return Settings(
        dim=run.embedding.dim,
        num_rows=cap // (2 * run.embedding.dim),
        num_columns=COLUMNS,
        learning_rate=rate,
        weight_decay=run.optimizer.embedding_weight_decay or 0.0,
        dense_learning_rate=run.optimizer.dense_learning_rate,
        batch_size=run.training.batch_size,
        epochs=run.training.epochs,
        clusterings=run.recluster.ct,
        seed=seed,
    )


def _train_once(plan: Plan, folder: Path, settings: Settings) -> tuple[Quality, Quality]:
    """(validation, test) of one run, kept in a file of the folder."""
    path = folder / f"k{settings.num_rows}-lr{settings.learning_rate:g}-seed{settings.seed}.json"
    if not path.exists():
        data = Path(str(plan.run.data.train.path)).parent
        sizes = {name: table.num_embeddings for name, table in plan.run.tables.items()}
        qualities = train_plain(data, sizes, settings)
        write_json(path, qualities)
    validation, test = (Quality(**values) for values in json.loads(path.read_text()))
    return validation, test


def print_figures(plan: Plan, groups: Sequence[SeedGroup], plain: dict[int, list[Quality]]) -> None:
    """The curve of every method, ours against the plain one, and columns against columns at the same pointer bytes."""
    dim = plan.run.embedding.dim
    by_name = {(group.first.name, group.first.max_parameters): group for group in groups}
    for (name, cap), group in by_name.items():
        per_dimension = "" if cap is None else f", {cap // dim} parameters a dimension"
        against = (
            f"{group.test_auc}, BCE {group.test_bce}, rate {group.first.learning_rate:g}, {len(group.trials)} seeds; "
            f"pointers {group.sizes.pointer_bytes:,} bytes, in all {group.sizes.total_bytes:,}"
        )
        report(f"gowalla, {name}{per_dimension}: test AUC", group.test_auc.mean, against=against)
    for cap, qualities in plain.items():
        where = f"gowalla, {cap // dim} parameters a dimension"
        peer = [quality.auc for quality in qualities]
        has_spread = len(peer) > 1  # one seed decides nothing
        spread = statistics.stdev(peer) if has_spread else 0.0
        ours = by_name[OURS, cap].test_auc
        report(
            f"{where}: test AUC of {OURS} minus the plain implementation's",
            ours.mean - float(np.mean(peer)),
            target="≥ 0" if has_spread else None,
            holds=ours.mean >= float(np.mean(peer)) if has_spread else None,
            against=f"the plain one: {np.mean(peer):.4f} ± {spread:.4f}; ours: {ours}",
        )
        for more in ("cce, 8 columns", "cce, 16 columns"):
            other = by_name[more, cap].test_auc
            width = 8 if cap // (2 * dim) <= 1 << 8 else 16
            report(
                f"{where}: test AUC of {more} minus that of {OURS}",
                other.mean - ours.mean,
                against=f"{more} of {width} bits: {other}; {OURS}: {ours}",
            )


def gowalla_figures(out: Path, *, workers: int, whole: bool = True) -> None:
    """Run what is not in the folder `out` yet, and print all figures; if not `whole`, of one size, seed and rate."""
    if not LOG.is_there:
        print(f"gowalla is skipped: {DATA} does not name the folder that holds it", file=sys.stderr)
        return
    plan = read_plan(PLANS / "gowalla_all.toml", sections=LOG.sections(out / "data"))
    plan = plan if whole else reduced(plan)
    results = bench(plan, out, workers=workers)
    (out / "plain").mkdir(exist_ok=True)
    print_figures(plan, seed_groups(chosen_results(results)), run_plain(plan, out / "plain", workers=workers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for data, runs and results")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    gowalla_figures(given.out, workers=given.workers)


if __name__ == "__main__":
    quiet_libraries()
    main()
