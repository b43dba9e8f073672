"""`torchrec-cce remap`: stored data with index pointers in place of raw IDs."""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from torchrec_cce.cli.maps import REGISTRY_FLAG
from torchrec_cce.data.remapped_format import HelperPolicy, Layout
from torchrec_cce.jobs.remap.output import Compression, FileFormat
from torchrec_cce.training.command import naming_flags, one_line_errors
from torchrec_cce.workers import EngineName

if TYPE_CHECKING:
    from torchrec_cce.jobs.remap.job import RemapProgress


def remap(
    output: Annotated[str, typer.Option(help="A new folder, or that of the same job to go on with; or in a store.")],
    registry: Annotated[str | None, REGISTRY_FLAG] = None,
    input: Annotated[
        str | None, typer.Option(help="Parquet: a file, a folder with all below it, or a glob; or in a store.")
    ] = None,
    version: Annotated[int | None, typer.Option(help="Of the maps; the current one if not given.")] = None,
    features: Annotated[
        list[str] | None,
        typer.Option(help="FEATURE or FEATURE=COLUMN, may be repeated; all that are columns if not given."),
    ] = None,
    layout: Annotated[
        Layout, typer.Option(help="words: packed into 64 bits; lists: of the pointers' own width.")
    ] = "words",
    helper: Annotated[
        HelperPolicy, typer.Option(help="drop: nothing for the helper; store: its codes; keep-raw: the raw column.")
    ] = "drop",
    format: Annotated[FileFormat, typer.Option(help="Of the output; arrow is IPC files.")] = "parquet",
    compression: Annotated[Compression, typer.Option(help="Of what is new; arrow knows zstd, lz4, none.")] = "zstd",
    engine: Annotated[EngineName, typer.Option(help="local: processes; ray: the cluster of RAY_ADDRESS.")] = "local",
    workers: Annotated[int | None, typer.Option(min=1, help="One a core if not given.")] = None,
    inverse_check: Annotated[
        bool, typer.Option("--inverse-check", help="Read a sample of every file back and prove it.")
    ] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Remap nothing: read a finished --output, and compare it with its manifest."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress line.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON value.")] = False,
) -> None:
    """Replace raw IDs in stored Parquet files by the index pointers of a published version.

    A job that was ended goes on where it was when it is run again.
    """
    if verify:
        _verify(output, as_json=as_json)
        return
    if registry is None or input is None:
        raise typer.BadParameter("--registry and --input are needed, unless --verify is given")
    from torchrec_cce.jobs.remap.job import remap as run

    pairs = [pair.partition("=") for pair in features or []]
    with one_line_errors(), naming_flags(features="--features"), _progress_bar(quiet) as bar:
        task = bar.add_task("", total=None, rate="")

        def show(done: "RemapProgress") -> None:
            seconds = max(1e-9, bar.tasks[task].elapsed or 0)
            bar.update(
                task,
                total=done.num_bytes,
                completed=done.done_bytes,
                description=f"{done.done_files}/{done.num_files} files",
                rate=f"{done.rows / seconds:,.0f} rows/s",
            )

        report = run(
            input,
            output,
            registry=registry,
            version=version,
            features={feature: column or feature for feature, _, column in pairs} or None,
            layout=layout,
            helper=helper,
            file_format=format,
            compression=compression,
            engine=engine,
            num_workers=workers,
            inverse_check=inverse_check,
            progress=show,
        )
    if as_json:
        typer.echo(json.dumps(asdict(report)))
        return
    before = f", {report.skipped_files:,} of them finished before" if report.skipped_files else ""
    proved = f"; {report.checked_rows:,} rows read back and proved" if inverse_check else ""
    unseen = ", ".join(f"{name} {count:,}" for name, count in report.unseen.items())
    unknown = f"; IDs that the map does not know: {unseen}" if unseen else ""
    typer.echo(
        f"remapped to version {report.version}: {report.num_files:,} files{before}, {report.num_rows:,} rows, "
        f"{decimal(report.input_bytes)} to {decimal(report.num_bytes)}, {report.seconds:.1f} s{proved}{unknown}"
    )


def _verify(output: str, *, as_json: bool) -> None:
    from torchrec_cce.jobs.remap.output import verify

    with one_line_errors():
        manifest = verify(output)
    unknown = sum(file.sha256 is None for file in manifest.files)
    found = {"num_files": len(manifest.files), "num_bytes": manifest.num_bytes, "without_digest": unknown}
    if as_json:
        typer.echo(json.dumps(found))
        return
    older = f"; {unknown:,} were written before digests were kept, of them only the sizes were compared"
    typer.echo(
        f"{len(manifest.files):,} files, {decimal(manifest.num_bytes)}, are as they were written"
        + (older if unknown else "")
    )


def _progress_bar(quiet: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=quiet or not sys.stderr.isatty(),
    )
