"""`torchrec-cce recluster`: cluster a checkpoint's tables, publish them, write the checkpoint to train on from."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import Progress, TaskID, TimeElapsedColumn

from torchrec_cce.cli.maps import RegistryURL
from torchrec_cce.errors import CCEError, RegistryError
from torchrec_cce.jobs.recluster.thresholds import Thresholds
from torchrec_cce.training.command import INTERRUPTED, naming_flags, print_table, quiet_libraries, say

if TYPE_CHECKING:
    from torchrec_cce.jobs.recluster.request import Forecast
    from torchrec_cce.jobs.recluster.summary import ReclusterSummary

_FAILED, _REFUSED, _CONFLICT = 1, 3, 4
_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_LIMITS = "Limits of the gates, beyond which nothing is published"
_FLAGS = {
    "output": "--output-checkpoint",
    "use_helper": "--with-helper or --without-helper",
    "validation": "--validate",
}
"""Field of `ReclusterJob` that an error may name → its flags."""


def _bytes(text: str) -> int:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2] not in _UNITS:
        raise typer.BadParameter(f"{text!r} is not a number with one of {', '.join(filter(None, _UNITS))}: 4GiB")
    return round(float(found[1]) * _UNITS[found[2]])


def _limit(text: str) -> Any:
    return typer.Option(min=0.0, help=text, rich_help_panel=_LIMITS)


def recluster(
    registry: RegistryURL,
    checkpoint: Annotated[Path, typer.Option(help="The folder of a run, or a distributed checkpoint.")],
    output_checkpoint: Annotated[Path, typer.Option(help="The new folder to train on from.")],
    without_helper: Annotated[
        list[str] | None,
        typer.Option(help="A table that has use_helper=False, may be repeated; a run says so by itself."),
    ] = None,
    with_helper: Annotated[
        list[str] | None,
        typer.Option(help="A table that has a helper, though it was not trained; may be repeated."),
    ] = None,
    frequencies: Annotated[
        Path | None, typer.Option(help=".npz: for each table, how often each ID was seen; else the checkpoint's.")
    ] = None,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="Where the work is done.")] = "local",
    workers: Annotated[int | None, typer.Option(min=1, help="One a core if not given.")] = None,
    memory: Annotated[
        int, typer.Option(parser=_bytes, metavar="SIZE", help="For this process and all workers together.")
    ] = "4GiB",  # type: ignore[assignment]
    seed: Annotated[int | None, typer.Option(help="The run's if not given, or 0.")] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Of k-means; the run's if not given, or 50.")] = None,
    points_per_centroid: Annotated[
        int | None,
        typer.Option(min=1, help="IDs that k-means trains on, for each codeword; the run's if not given, or 256."),
    ] = None,
    helper_init: Annotated[
        Literal["zero", "residual"] | None, typer.Option(help="The new helper; the run's if not given, or zero.")
    ] = None,
    validate: Annotated[
        Path | None, typer.Option(help="A log of the run's layout: its BCE before and after is one more gate.")
    ] = None,
    min_h1: Annotated[float, _limit("H1 over log k.")] = Thresholds.min_h1,
    min_h2_gain: Annotated[float, _limit("H2 − H1, over that of random pointers.")] = Thresholds.min_h2_gain,
    min_learned: Annotated[float, _limit("1 − H1 or H2 over that of random pointers.")] = Thresholds.min_learned,
    max_error: Annotated[float, _limit("Squared distance to the codewords over variance.")] = Thresholds.max_error,
    max_objective_ratio: Annotated[
        float, _limit("Squared distance to the codewords over that to the parent's clusters.")
    ] = Thresholds.max_objective_ratio,
    max_churn: Annotated[float, _limit("Share of pointers that change.")] = Thresholds.max_churn,
    max_unseen: Annotated[float, _limit("Share of IDs that were never seen.")] = Thresholds.max_unseen,
    max_bce_ratio: Annotated[float, _limit("Validation BCE after over before.")] = Thresholds.max_bce_ratio,
    force: Annotated[bool, typer.Option("--force", help="Publish whatever the gates say, and record that.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check, and say what it would take.")] = False,
    report: Annotated[Path | None, typer.Option(help="Folder for report.json and a page with plots.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON value, also of an error.")] = False,
) -> None:
    """Cluster the CCE tables of a checkpoint by themselves, publish them, and write the checkpoint to train on from.

    Exit status: 0 done, 1 an error, 2 a mistake in the options, 3 a gate is closed, 4 the registry, or what is current
    in it, 130 interrupted. The same command may be run again after any of them, and after a kill.
    """
    both = sorted({*(with_helper or [])} & {*(without_helper or [])})
    if both:
        raise typer.BadParameter(f"{both} are named by both --with-helper and --without-helper")
    quiet_libraries()
    with _status(as_json), naming_flags(**_FLAGS):
        from torchrec_cce.jobs.recluster.job import recluster as run
        from torchrec_cce.jobs.recluster.request import ReclusterJob, foresee
        from torchrec_cce.jobs.recluster.summary import write_report

        job = ReclusterJob(
            registry=registry,
            checkpoint=checkpoint,
            output=output_checkpoint,
            use_helper=dict.fromkeys(with_helper or [], True) | dict.fromkeys(without_helper or [], False),
            frequencies=frequencies,
            engine=engine,
            num_workers=workers,
            memory_bytes=memory,
            seed=seed,
            num_iterations=iterations,
            points_per_centroid=points_per_centroid,
            helper_init=helper_init,
            validation=validate,
            thresholds=Thresholds(
                min_h1=min_h1,
                min_h2_gain=min_h2_gain,
                min_learned=min_learned,
                max_error=max_error,
                max_objective_ratio=max_objective_ratio,
                max_churn=max_churn,
                max_unseen=max_unseen,
                max_bce_ratio=max_bce_ratio,
            ),
            force=force,
        )
        if dry_run:
            forecast = foresee(job)
            typer.echo(forecast.to_json()) if as_json else _print_forecast(forecast)
            return
        with _progress() as progress:
            done = run(job, progress=progress)
        summary = done.summary
        typer.echo(summary.to_json()) if as_json else _print_summary(summary)
    if report is not None and done.cluster_sizes:
        try:
            missing = write_report(report, summary, done.cluster_sizes)
        except OSError as error:  # the job itself has done what it was asked for
            missing = str(error)
        if missing:
            say(f"warning: no page in {report}: {missing}")
    if summary.status == "refused":
        raise typer.Exit(_REFUSED)


@contextmanager
def _status(as_json: bool) -> Iterator[None]:
    """Turn an error into one line, or one JSON value, and an exit status."""
    try:
        yield
    except KeyboardInterrupt as error:
        say("interrupted; run the same command again")
        raise typer.Exit(INTERRUPTED) from error
    except (CCEError, OSError) as error:
        message = " ".join(str(error).split())
        say(f"error: {message}")
        if as_json:
            typer.echo(json.dumps({"status": "error", "error": message}))
        raise typer.Exit(_CONFLICT if isinstance(error, RegistryError) else _FAILED) from error


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A line a step on stderr, if somebody watches."""
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as lines:
        steps: dict[str, TaskID] = {}

        def tell(step: str, share: float) -> None:
            if step not in steps or (share == 0 and lines.tasks[steps[step]].finished):
                steps[step] = lines.add_task(step, total=1.0)
            lines.update(steps[step], completed=share)

        yield tell


def _print_summary(summary: "ReclusterSummary") -> None:
    from torchrec_cce.jobs.recluster.summary import GATE_COLUMNS, gate_cells

    print_table(GATE_COLUMNS, [gate_cells(gate) for gate in summary.gates])
    if summary.before is not None and summary.after is not None:
        typer.echo(f"validation BCE {summary.before.bce:.5f} before, {summary.after.bce:.5f} after")
    closed = len(summary.closed)
    if summary.status == "refused":
        typer.echo(f"{closed} gates are closed: nothing was published, version {summary.parent} is what it was")
        return
    said = {
        "published": "published",
        "finished": "finished; it had been published before:",
        "there already": "there already:",
    }[summary.status]
    forced = f", although {closed} gates are closed" if summary.forced else ""
    typer.echo(
        f"{said} version {summary.version}, made from version {summary.parent}{forced}; train on from {summary.output}"
    )


def _print_forecast(forecast: "Forecast") -> None:
    disk, clustering = forecast.disk, forecast.clustering
    ids = ", ".join(f"{name} {number:,}" for name, number in forecast.num_ids.items())
    typer.echo(f"{forecast.checkpoint}, made from version {forecast.parent}; IDs: {ids}")
    without = ", ".join(name for name, used in forecast.use_helper.items() if not used)
    typer.echo(f"without helper: {without or 'none'}")
    if forecast.residents:
        folded = ", ".join(f"{name} {number:,}" for name, number in forecast.residents.items())
        typer.echo(f"residents whose rows are folded: {folded}")
    rows = [(name, f"{stage.tasks:,}", f"{stage.seconds:,.1f}") for name, stage in clustering.stages.items()]
    print_table(("stage", "tasks", "seconds"), rows)
    typer.echo(f"memory: {decimal(clustering.memory_bytes)}")
    typer.echo(
        f"disk: {decimal(disk.output)} for {forecast.output}, {decimal(disk.scratch)} beside it meanwhile, "
        f"{decimal(clustering.disk_bytes)} in the cache folder, {decimal(disk.registry)} in the registry"
    )
    limits = ", ".join(f"{name} {value:g}" for name, value in vars(forecast.thresholds).items())
    typer.echo(f"gates: {limits}")
