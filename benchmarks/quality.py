"""Quality against size on a planted and three real logs: full tables, hashing trick, CE concat, CCE and residents.

The project may not ship the real logs: they are read from the folder in TORCHREC_CCE_DATA, and skipped without it.
Figures go to stdout, and for each log a report and a table to `runs/bench-quality/<log>`.
"""

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.experiments import EXPERIMENTS, Experiment
from benchmarks.figure import report
from benchmarks.logs import DATA, LOGS
from torchrec_cce.experiments.comparison import comparison_report, to_markdown
from torchrec_cce.experiments.compression import compression
from torchrec_cce.experiments.curve import SeedGroup, compressed, curves_of, full_table, seed_groups
from torchrec_cce.experiments.plan import parse_plan
from torchrec_cce.experiments.report import write_report
from torchrec_cce.experiments.results import RUNS, TrialResult, chosen_results
from torchrec_cce.experiments.runner import bench
from torchrec_cce.methods.cce import CCEEmbeddingBagConfig
from torchrec_cce.training.config import parse_config

FOLDER = Path("runs/bench-quality")
WORKERS = 2


def run(experiment: Experiment) -> None:
    """Train everything, print the figures and write the report."""
    started = time.perf_counter()
    folder, log = FOLDER / experiment.name, LOGS[experiment.name]
    shutil.rmtree(folder, ignore_errors=True)
    plan = parse_plan(
        {
            "run": experiment.sections,
            "methods": [
                {"method": method, "learning_rates": rates}
                for methods, rates in experiment.learning_rates.items()
                for method in methods
            ]
            + [residents.entry() for residents in experiment.residents],
            "caps": experiment.caps,
            "seeds": experiment.seeds,
        },
        sections=log.sections(folder / "data"),
    )
    results = chosen_results(bench(plan, folder, workers=WORKERS, show_progress=False))
    print_figures(experiment.name, seed_groups(results))
    print_residents(experiment, seed_groups(results))
    print_crossings(experiment.name, results)
    recluster, training = plan.run.recluster, plan.run.training
    about = {
        "log": f"{log.about}; {experiment.sections['model']['name'].upper()}",
        "seeds": f"{len(experiment.seeds)}; ± is the standard deviation",
        "embedding learning rates": "; ".join(
            f"{', '.join(methods)}: best of {', '.join(map(str, rates))} on validation"
            for methods, rates in experiment.learning_rates.items()
        ),
        "chosen": "; ".join(f"{_name(group)}: {group.first.learning_rate:g}" for group in seed_groups(results)),
        "clusterings": f"{recluster.ct}, every {recluster.cf} batches of {training.batch_size}",
        "epochs": str(training.epochs),
    }
    title = f"Quality against size on {experiment.name}"
    write_report(folder, comparison_report(results, title=title, about=about, runs=folder / RUNS))
    text = [f"# {experiment.name}", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    (folder / "results.md").write_text("\n".join([*text, to_markdown(results), ""]))
    shutil.rmtree(folder / "data")
    print(f"{folder / 'results.md'}, after {time.perf_counter() - started:.0f} s", file=sys.stderr)


def print_figures(log: str, groups: Sequence[SeedGroup]) -> None:
    """AUC, BCE and the three compression factors of each method and cap."""
    full = next(group for group in groups if group.first.method == "full")
    concat_at = {group.first.max_parameters: group for group in groups if group.first.method == "ce_concat"}
    for group in groups:
        rival = concat_at.get(group.first.max_parameters) if group.first.method == "cce" else None
        auc, bce = group.test_auc, group.test_bce
        report(
            f"{log}, {_name(group)}: test AUC, mean of {len(group.trials)} seeds",
            auc.mean,
            target="≥ CE concat at the same cap" if rival else None,
            holds=auc.mean >= rival.test_auc.mean if rival else None,
            against=f"this is {auc}; full tables {full.test_auc}" + (f"; CE concat {rival.test_auc}" if rival else ""),
        )
        report(
            f"{log}, {_name(group)}: test BCE, mean of {len(group.trials)} seeds",
            bce.mean,
            target="≤ CE concat at the same cap" if rival else None,
            holds=bce.mean <= rival.test_bce.mean if rival else None,
            against=f"this is {bce}; full tables {full.test_bce}" + (f"; CE concat {rival.test_bce}" if rival else ""),
        )
        if group.first.method == "full":
            continue
        sizes = group.sizes
        for what, factor in (
            ("trained parameters, all tables", sizes.parameter_factor),
            (f"trained parameters, largest table ({sizes.largest_table})", sizes.largest_factor),
            ("total bytes, pointers counted", sizes.byte_factor),
        ):
            report(f"{log}, {_name(group)}: {what}, times fewer", factor, against="full tables")


def print_residents(experiment: Experiment, groups: Sequence[SeedGroup]) -> None:
    """Quality against full tables, and what is held to train."""
    full = next(group for group in groups if group.first.method == "full")
    for wanted in experiment.residents:
        for group in (group for group in groups if group.first.name == wanted.name):
            name, auc, bce = f"{experiment.name}, {_name(group)}", group.test_auc, group.test_bce
            against = f"{len(group.trials)} seeds: {auc}; full tables {full.test_auc}"
            if wanted.min_auc is not None:
                target = f"≥ {wanted.min_auc}"
                report(f"{name}: test AUC", auc.mean, target=target, holds=auc.mean >= wanted.min_auc, against=against)
            if wanted.max_auc_gap is not None:
                gap, target = full.test_auc.mean - auc.mean, f"≤ {wanted.max_auc_gap}"
                holds = gap <= wanted.max_auc_gap
                report(f"{name}: test AUC below full tables", gap, target=target, holds=holds, against=against)
            most = wanted.max_bce_gap
            if wanted.max_bce_errors is not None:
                most = wanted.max_bce_errors * full.test_bce.deviation / len(full.trials) ** 0.5
            if most is not None:
                gap = bce.mean - full.test_bce.mean
                target, against = f"≤ {most:.2g}", f"{len(group.trials)} seeds: {bce}; full tables {full.test_bce}"
                report(f"{name}: test BCE above full tables", gap, target=target, holds=gap <= most, against=against)
            tables = parse_config(dict(group.first.config)).table_configs()
            ids = [table.num_embeddings for table in tables if isinstance(table, CCEEmbeddingBagConfig)]
            residency = sum(table.residency_bytes for table in tables if isinstance(table, CCEEmbeddingBagConfig))
            rows = (group.sizes.resident_bytes - residency) / sum(ids)
            report(
                f"{name}: bytes an ID of rows and their optimizer while training",
                rows,
                target=None if wanted.max_bytes is None else f"≤ {wanted.max_bytes}",
                holds=None if wanted.max_bytes is None else rows <= wanted.max_bytes,
                against=f"{group.sizes.resident_bytes / sum(ids):.2f} with ages and slots, and 8 of frequencies; "
                f"{4 * group.first.config['embedding']['dim'] + 4} of a full table with row-wise Adagrad",
            )


def print_crossings(log: str, results: Sequence[TrialResult]) -> None:
    """How many times fewer parameters each method needs to reach the full tables' BCE; extrapolated if it must be."""
    curves = curves_of(results)
    full = full_table(curves)
    assert full is not None
    for curve in compressed(curves):
        entry = compression(curve, full)
        if entry.found is None or len(curve.points) < 2:
            continue
        factor = entry.found.parameter_factor
        spread = "" if factor.worst is None else f"; 95 % of resampled seeds: {factor.worst:.3g} to {factor.best:.3g}"
        report(
            f"{log}, {curve.name}: trained parameters, all tables, times fewer at the full tables' test BCE",
            factor.optimistic,
            against=f"{entry.state}, by a line; by a parabola {factor.pessimistic:.3g}{spread}",
        )


def _name(group: SeedGroup) -> str:
    first = group.first
    return first.name if first.max_parameters is None else f"{first.name}, cap {first.max_parameters}"


def main() -> None:
    wanted = sys.argv[1:] or [experiment.name for experiment in EXPERIMENTS if not experiment.only_by_name]
    for experiment in EXPERIMENTS:
        if experiment.name not in wanted:
            continue
        if not LOGS[experiment.name].is_there:
            print(f"{experiment.name} is skipped: {DATA} does not name the folder that holds it", file=sys.stderr)
            continue
        run(experiment)


if __name__ == "__main__":
    main()
