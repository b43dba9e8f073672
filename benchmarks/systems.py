"""Every method on a real log, or a whole plan: `python -m benchmarks.systems PLAN --out FOLDER`.

A plan of `benchmarks/plans` says what runs on the log that it is named after; the log is prepared here. Figures go to
stdout. Without a plan, all methods of `criteo_80k` and those of the curve on Gowalla run, each at one cap, one seed and
one learning rate.
"""

import argparse
import os
import sys
from pathlib import Path

from benchmarks.figure import report
from benchmarks.gowalla import gowalla_figures
from benchmarks.logs import DATA, LOGS, PLANS
from benchmarks.reduced import reduced
from torchrec_cce.experiments.curve import SeedGroup, seed_groups
from torchrec_cce.experiments.plan import read_plan
from torchrec_cce.experiments.results import RESULTS, chosen_results
from torchrec_cce.experiments.runner import bench
from torchrec_cce.training.command import quiet_libraries

FOLDER = Path("runs/bench-systems")


def print_figures(log: str, groups: list[SeedGroup]) -> None:
    """Test BCE and AUC of each method and cap, and the three compression factors."""
    full = next(group for group in groups if group.first.method == "full")
    for group in groups:
        first, sizes = group.first, group.sizes
        cap = "" if first.max_parameters is None else f", cap {first.max_parameters}"
        name = f"{log}, {first.name}{cap}"
        factors = (
            f"trained parameters ÷ {sizes.parameter_factor:.1f}, of the largest table ÷ {sizes.largest_factor:.1f}, "
            f"bytes with pointers ÷ {sizes.byte_factor:.1f}"
        )
        against = f"{len(group.trials)} seeds; full tables {full.test_bce}, AUC {full.test_auc}; {factors}"
        report(f"{name}: test BCE at the rate {first.learning_rate:g}", group.test_bce.mean, against=against)
        report(f"{name}: test AUC", group.test_auc.mean, against="as above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan", nargs="?", type=Path, help="a plan, named after its log or `log-…`")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for data, runs and results")
    parser.add_argument("--log", choices=LOGS, help="the log, where the plan is not named after it")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    path = given.plan or PLANS / "criteo_80k.toml"
    name = given.log or path.stem
    if name not in LOGS:
        parser.error(f"{path}: no log is named {name}; give --log, one of {', '.join(LOGS)}")
    if not LOGS[name].is_there:
        print(f"{name} is skipped: {DATA} does not name the folder that holds it", file=sys.stderr)
        return
    plan = read_plan(path, sections=LOGS[name].sections(given.out / "data" / name))
    results = bench(plan if given.plan else reduced(plan), given.out, workers=given.workers)
    print_figures(name, seed_groups(chosen_results(results)))
    for result in results:
        if result.chosen and result.error is not None:
            print(f"{result.run} failed: {result.error}", file=sys.stderr)
    print(f"results: {given.out / RESULTS}", file=sys.stderr)
    if given.plan is None:
        gowalla_figures(given.out / "gowalla", workers=given.workers, whole=False)


if __name__ == "__main__":
    quiet_libraries()
    main()
