"""`torchrec-cce maps …`: the registry of published maps, for people and (`--json`) for machines."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import TypeAdapter
from rich.filesize import decimal

from torchrec_cce.errors import ConfigError
from torchrec_cce.maps.manifest import Manifest
from torchrec_cce.maps.registry import Registry
from torchrec_cce.training.command import one_line_errors, plain, print_table, quiet_libraries

_DAMAGED = 1
_LEAST_HOURS = 1.0
REGISTRY_FLAG = typer.Option(envvar="TORCHREC_CCE_REGISTRY", help="A folder, or a URL: s3://…, gs://…, az://…")

RegistryURL = Annotated[str, REGISTRY_FLAG]
AsJSON = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]
VersionOrCurrent = Annotated[int | None, typer.Argument(help="A version; the current one if not given.")]
Version = Annotated[int, typer.Argument()]

app = typer.Typer(no_args_is_help=True, help="Published versions of index-pointer maps.")


@app.command("list")
def list_versions(registry: RegistryURL, as_json: AsJSON = False) -> None:
    """List the versions that can be opened."""
    with one_line_errors():
        state = Registry(registry).state()
    if as_json:
        typer.echo(_json(state))
        return
    rows = [
        [
            f"{entry.version}{' ← current' * (entry.version == state.current)}{' (pinned)' * entry.pinned}",
            _or_dash(entry.parent),
            f"{entry.created:%Y-%m-%d %H:%M:%S} UTC",
            decimal(entry.num_bytes),
            entry.manifest_sha256[:12],
        ]
        for entry in state.versions
    ]
    print_table(["version", "parent", "created", "size", "manifest"], rows)


@app.command()
def history(registry: RegistryURL, as_json: AsJSON = False) -> None:
    """List every step that changed the registry: when, who, what, and which version was current after it."""
    with one_line_errors():
        records = Registry(registry).history()
    if as_json:
        typer.echo(_json(records))
        return
    rows = [
        [
            str(record.sequence),
            "" if record.time is None else f"{record.time:%Y-%m-%d %H:%M:%S} UTC",
            str(record.action),
            _or_dash(record.subject),
            _or_dash(record.current),
            record.author,
        ]
        for record in records
    ]
    print_table(["step", "time", "action", "version", "current", "by"], rows)


@app.command()
def show(registry: RegistryURL, version: VersionOrCurrent = None, as_json: AsJSON = False) -> None:
    """Show the manifest of a version."""
    with one_line_errors():
        manifest = Registry(registry).manifest(version)
    typer.echo(_json(manifest)) if as_json else _print_manifest(manifest)


@app.command()
def verify(
    registry: RegistryURL,
    version: Annotated[int | None, typer.Argument(help="A version; all if not given.")] = None,
    as_json: AsJSON = False,
) -> None:
    """Read every file and compare its SHA-256. Exit status 1 if anything is damaged."""
    with one_line_errors():
        damage = [str(error) for error in Registry(registry).verify(version)]
    typer.echo(_json(damage) if as_json else "\n".join(map(plain, damage or ["no damage"])))
    if damage:
        raise typer.Exit(_DAMAGED)


@app.command()
def diff(registry: RegistryURL, old: Version, new: Version, as_json: AsJSON = False) -> None:
    """Compare two versions table by table."""
    with one_line_errors():
        tables = Registry(registry).diff(old, new)
    if as_json:
        typer.echo(_json(tables))
        return
    rows = [
        [name, "not comparable", "", "", ""]
        if churn is None
        else [
            name,
            f"{churn.share_changed:.1%}",
            *(f"{n:,}" for n in (churn.num_common, churn.num_added, churn.num_removed)),
        ]
        for name, churn in tables.items()
    ]
    print_table(["table", "changed pointers", "common IDs", "added", "removed"], rows)


@app.command()
def publish(
    registry: RegistryURL,
    run_dir: Annotated[Path, typer.Option(help="The folder of a training run.")],
    parent: Annotated[int | None, typer.Option(help="Refuse unless this version is current.")] = None,
    as_json: AsJSON = False,
) -> None:
    """Publish maps and codebooks of a run's newest checkpoint, and make them current."""
    quiet_libraries()
    from torchrec_cce.training.versions import snapshot_of_run

    with one_line_errors():
        run = snapshot_of_run(run_dir)
        entry = Registry(registry).publish(
            run.tables, parent=parent, checkpoint=run.checkpoint, config_digest=run.config_digest
        )
    published = f"published {entry.identity}, {decimal(entry.num_bytes)}; it is current"
    typer.echo(_json(entry) if as_json else published)


@app.command()
def rollback(registry: RegistryURL, version: Version, as_json: AsJSON = False) -> None:
    """Make an earlier version current again."""
    with one_line_errors():
        entry = Registry(registry).rollback(version)
    typer.echo(_json(entry) if as_json else f"{entry.identity} is current")


@app.command()
def pin(registry: RegistryURL, version: Version, as_json: AsJSON = False) -> None:
    """Keep a version from being collected."""
    _pin(registry, version, True, as_json)


@app.command()
def unpin(registry: RegistryURL, version: Version, as_json: AsJSON = False) -> None:
    """Let a version be collected."""
    _pin(registry, version, False, as_json)


@app.command()
def gc(
    registry: RegistryURL,
    keep_last: Annotated[int, typer.Option(help="Versions kept besides the current and the pinned ones.")],
    debris_hours: Annotated[
        float, typer.Option(help="Age in hours from which files of publishers that died are deleted.")
    ] = 24.0,
    keep_records: Annotated[int, typer.Option(min=1, help="Steps that the history keeps.")] = 1000,
    force: Annotated[
        bool, typer.Option("--force", help="Allow debris of less than an hour: publishers at work have to begin anew.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    as_json: AsJSON = False,
) -> None:
    """Delete old versions, and what publishers that died left behind."""
    with one_line_errors():
        if debris_hours < _LEAST_HOURS and not (force or dry_run):
            raise ConfigError(
                f"--debris-hours={debris_hours:g} is less than {_LEAST_HOURS:g}: it takes files of publishers that are "
                "at work, which then have to begin anew. Give it more, or --force"
            )
        done = Registry(registry).gc(
            keep_last=keep_last,
            debris_age=timedelta(hours=debris_hours),
            keep_records=keep_records,
            dry_run=dry_run,
        )
    if as_json:
        typer.echo(_json(done))
        return
    versions = ", ".join(map(str, done.versions)) or "none"
    would = "would delete" if dry_run else "deleted"
    typer.echo(f"{would} versions: {versions}; debris: {len(done.debris)} items; {decimal(done.num_bytes)}")


def _pin(registry: str, version: int, pinned: bool, as_json: bool) -> None:
    with one_line_errors():
        entry = Registry(registry).pin(version, pinned=pinned)
    typer.echo(_json(entry) if as_json else f"{entry.identity} is {'pinned' if pinned else 'not pinned'}")


def _print_manifest(manifest: Manifest) -> None:
    made = manifest.provenance
    made_by = (
        f"version {manifest.version}, parent {_or_dash(manifest.parent)}, created "
        f"{manifest.created:%Y-%m-%d %H:%M:%S} UTC by torchrec_cce {made.code_version} from {made.checkpoint or '–'}"
    )
    typer.echo(plain(made_by))
    rows = [
        [
            name,
            f"{table.num_ids:,}",
            f"{table.num_columns} × {table.num_rows:,}",
            str(table.generation),
            table.pointer_dtype or "hashed",
            "–" if table.vocabulary is None else f"{table.vocabulary.file.num_bytes / max(1, table.num_ids):.1f} B/ID",
            table.unseen,
            " ".join(f"{value:.2f}" for value in table.entropies) or "–",
            "–" if table.churn is None else f"{table.churn:.1%}",
            table.map_digest[:12],
        ]
        for name, table in manifest.tables.items()
    ]
    headers = ["table", "IDs", "codewords", "generation", "pointers", "vocabulary", "unseen", "H1 …", "churn", "digest"]
    print_table(headers, rows)


def _json(value: Any) -> str:
    return json.dumps(TypeAdapter(Any).dump_python(value, mode="json"))


def _or_dash(value: int | None) -> str:
    return "–" if value is None else str(value)
