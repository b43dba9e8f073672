"""`torchrec-cce plan RUN.toml`: what TorchRec's planner makes of a run's tables, before there are any machines."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.filesize import decimal

from torchrec_cce.errors import ConfigError
from torchrec_cce.training.command import one_line_errors, print_table, quiet_libraries

if TYPE_CHECKING:
    from torchrec.distributed.planner import Topology

    from torchrec_cce.methods.registry import Method
    from torchrec_cce.sharding.estimates import PlanSummary, TableSummary
    from torchrec_cce.training.config import RunConfig
    from torchrec_cce.training.footprint import CachedTables, Footprint

_GIB = 2**30
_COLUMNS = ("table", "method", "placement", "device", "host", "all-to-all", "all-reduce", "ms")
_NOTE = (
    "Estimates of TorchRec's planner. device, host: bytes on the fullest GPU and host, a batch and maps included; "
    "all-to-all, all-reduce: bytes that a rank sends in a step; ms: lookup, update and communication of a step."
)
_HELD = ("method", "training", "tables", "optimizer", "residents", "pointers", "frequencies")
_HELD_NOTE = "training: bytes that are held to train, on all ranks and hosts together, each replica once; by formula."
_COMPUTED = "replicated, not planned"
"""Of tables whose embeddings are computed, not looked up: TorchRec's planner knows none of them."""
_COMPARED: "tuple[Method, ...]" = ("full", "hashing_trick", "cce")


def plan(
    config: Annotated[Path, typer.Argument(help="The run's TOML file; its data is not read.")],
    world_size: Annotated[int, typer.Option(min=1, help="Ranks.")],
    local_world_size: Annotated[
        int | None, typer.Option(min=1, help="Ranks of a host; at most 8 if not given.")
    ] = None,
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="Where tables are trained.")] = "cuda",
    hbm_gb: Annotated[float, typer.Option(min=0, help="Memory of a GPU, GiB.")] = 80.0,
    ddr_gb: Annotated[float, typer.Option(min=0, help="Memory of a host, GiB.")] = 1024.0,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows of one rank's batch; the run's, shared by the ranks, if not given.")
    ] = None,
    pooling_factor: Annotated[
        list[str] | None,
        typer.Option(help="Raw IDs in a bag, on average: 20 for all features or user=20 for one; may be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON value.")] = False,
) -> None:
    """Plan where tables go on many ranks, for full tables, the hashing trick, CCE and the run's own method.

    Nothing is built or trained.
    """
    quiet_libraries()
    from torchrec_cce.sharding.planner import planning_topology
    from torchrec_cce.training.config_file import read_config
    from torchrec_cce.training.footprint import Footprint, cached_tables, footprints

    with one_line_errors():
        run = read_config(config)
        topology = planning_topology(
            device,
            world_size=world_size,
            local_world_size=local_world_size or min(8, world_size),
            device_bytes=round(hbm_gb * _GIB),
            host_bytes=round(ddr_gb * _GIB),
        )
        rows = batch_size or -(-run.training.batch_size // world_size)
        lengths = _lengths(run, pooling_factor or [])
        plans = {method: _planned(run, method, topology, rows, lengths) for method in _methods(run)}
        cached = cached_tables(run)
    held = {
        method: Footprint.sum_of(footprints(run, method).values())
        for method, plan in plans.items()
        if method == "full" or not isinstance(plan, str)
    }
    if as_json:
        ranks = {"world_size": world_size, "local_world_size": topology.local_world_size, "batch_size": rows}
        values = {method: {"error": plan} if isinstance(plan, str) else asdict(plan) for method, plan in plans.items()}
        training = {method: {**asdict(each), "total": each.total} for method, each in held.items()}
        typer.echo(json.dumps({**ranks, "plans": values, "training_bytes": training, "cached_full": asdict(cached)}))
        return
    _print(run, plans)
    _print_held(held, cached)


def _methods(run: "RunConfig") -> "Sequence[Method]":
    """Those that are compared; without a cap there is nothing to compress to."""
    return tuple(dict.fromkeys((*_COMPARED, run.embedding.method))) if run.embedding.max_parameters else _COMPARED[:1]


def _lengths(run: "RunConfig", given: Sequence[str]) -> dict[str, float]:
    """Feature → raw IDs in a bag."""
    lengths = dict.fromkeys(run.universes(), 1.0)
    for factor in given:
        feature, _, number = factor.rpartition("=")
        try:
            length = float(number)
        except ValueError:
            length = -1.0
        if length <= 0 or (feature and feature not in lengths):
            raise ConfigError(
                f"--pooling-factor {factor}: neither a positive number nor feature=number for a feature of the run, "
                f"{', '.join(lengths)}"
            )
        lengths.update({feature: length} if feature else dict.fromkeys(lengths, length))
    return lengths


def _planned(
    run: "RunConfig", method: "Method", topology: "Topology", batch_size: int, lengths: dict[str, float]
) -> "PlanSummary | str":
    """The plan of one method, or why there is none."""
    from torchrec_cce.training.placement import summary_of

    try:
        return summary_of(run, method, topology, batch_size, lengths)
    except ConfigError as error:
        return str(error)


def _print(run: "RunConfig", plans: "dict[Method, PlanSummary | str]") -> None:
    rows: list[tuple[str, ...]] = []
    made = {method: plan for method, plan in plans.items() if not isinstance(plan, str)}
    for name in run.tables:
        for method, plan in made.items():
            found = next((table for table in plan.tables if table.table.rpartition(".")[2] == name), None)
            if found is None:
                rows.append((name, method, _COMPUTED))
            else:
                placement = f"{found.sharding_type}, {found.compute_kernel}, on {found.num_ranks}"
                rows.append((name, method, placement, *_figures(found)))
    for method, plan in made.items():
        if len(plan.tables) == len(run.tables):
            rows.append(("all", method, "", *_figures(plan)))
    print_table(_COLUMNS, rows)
    for method, reason in plans.items():
        if isinstance(reason, str):
            typer.echo(f"{method}: {reason}")
    typer.echo(_NOTE)


def _print_held(held: "dict[Method, Footprint]", cached: "CachedTables") -> None:
    rows = [
        (method, *(decimal(size) if size else "–" for size in (each.total, *asdict(each).values())))
        for method, each in held.items()
    ]
    print_table(_HELD, rows)
    typer.echo(_HELD_NOTE)
    typer.echo(
        "Full tables in host memory behind a cache of a fifth of their rows (UVM caching): "
        f"{decimal(cached.device_bytes)} on devices, {decimal(cached.host_bytes)} on hosts; by formula."
    )


def _figures(planned: "TableSummary | PlanSummary") -> tuple[str, ...]:
    sizes = (planned.device_bytes, planned.host_bytes, planned.all_to_all_bytes, planned.all_reduce_bytes)
    return (*(decimal(size) if size else "–" for size in sizes), f"{planned.milliseconds:.3f}")
