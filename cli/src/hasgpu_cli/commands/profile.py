"""`hasgpu profile`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from hasgpu_core.errors import DeadlineError, HasgpuError

from hasgpu_cli.client import Target
from hasgpu_cli.options import json_option, print_json, run, target_options
from hasgpu_cli.profiling.axes import make_axes, parse_budget_s, parse_list
from hasgpu_cli.profiling.display import progress_display
from hasgpu_cli.profiling.file import ProfileFile
from hasgpu_cli.profiling.place import Place, fetch_spec, find_place
from hasgpu_cli.profiling.sweep import Sweep, ingest, make_header

EXIT_INTERRUPTED = 130
MOST_BATCH = 1_024


@click.command("profile")
@click.argument("function")
@click.option("--node", default="", help="Measure on this node [the first live one].")
@click.option("--gpu", default="", help="Measure on this device of it [the first].")
@click.option("--budget", default="60s", show_default=True, help="Time for measuring, as 60s or 2m; loading is extra.")
@click.option("--batches", default="", metavar="N,...", help="Batch sizes [1, 2, 4, ... up to the function's limit].")
@click.option("--sm", default="", metavar="PCT,...", help="SM shares in per cent [those that the device offers].")
@click.option("--quota", default="", metavar="PERMILLE,...", help="Quotas in per mille; 1000 always [1000,500,200].")
@click.option("--out", type=click.Path(path_type=Path), help="The file; may hold others' [<device model>.profile.csv].")
@click.option("--resume/--no-resume", default=True, help="Measure only what the file lacks [--resume].")
@click.option("--ingest/--no-ingest", "tell_rapp", default=True, help="Hand the points to rapp at the end [--ingest].")
@json_option
@target_options("gateway", "scheduler", "rapp")
def profile_command(target: Target, function: str, tell_rapp: bool, as_json: bool, **options: Any) -> None:
    """Measure the latency of FUNCTION over batch, SM share and quota, and write a profile file.

    Every point is written as it comes. After Ctrl-C, or when the budget is used up, run the same command again: it
    measures what is missing. Several functions of one device may share a file.
    """
    sweep_box: list[Sweep] = []
    try:
        taken_count = run(_profile(target, function, tell_rapp=tell_rapp, quiet=as_json, box=sweep_box, **options))
    except KeyboardInterrupt:
        if not sweep_box or not sweep_box[0].done_count:
            click.echo("interrupted before the first point", err=True)
        else:
            click.echo(f"interrupted: {_state(sweep_box[0])}", err=True)
        raise SystemExit(EXIT_INTERRUPTED) from None
    (sweep,) = sweep_box
    if as_json:
        print_json(_document(sweep, taken_count))
        return
    click.echo(_state(sweep))
    if taken_count is not None:
        click.echo(f"rapp took {taken_count} points of {function} on {sweep.place.device.model}")


async def _profile(
    target: Target, function: str, *, tell_rapp: bool, quiet: bool, box: list[Sweep], **options: Any
) -> int | None:
    """Returns how many points rapp took; None: it was not asked."""
    from hasgpu_runtime.wire import spec_from_proto

    budget_s = parse_budget_s(options["budget"])
    batches = parse_list("--batches", options["batches"], MOST_BATCH)
    sm_pcts = parse_list("--sm", options["sm"], 100)
    quotas = parse_list("--quota", options["quota"], 1_000)
    async with target.session():
        spec = await fetch_spec(target, function)
        place = await find_place(target, node=options["node"], gpu=options["gpu"])
        max_batch = spec_from_proto(spec).max_batch
        axes = make_axes(place.device, max_batch=max_batch, batches=batches, sm_pcts=sm_pcts, quotas_permille=quotas)
        out = options["out"] or Path(f"{place.device.model}.profile.csv")
        file = ProfileFile(out.absolute(), make_header(place, spec), resume=options["resume"])
        with progress_display(function, live=sys.stderr.isatty() and not quiet) as show:
            sweep = Sweep(place, spec, axes, budget_s, file, show)
            box.append(sweep)
            await sweep.run(target)
        if sweep.missing and not sweep.measured:
            raise DeadlineError(f"a budget of {budget_s:g} s is too small for one point of {function}: nothing is new")
        return await _ingest(target, place, sweep) if tell_rapp else None


async def _ingest(target: Target, place: Place, sweep: Sweep) -> int:
    try:
        return await ingest(target, place, sweep.file.rows(), sweep.operators)
    except HasgpuError as error:
        raise HasgpuError(f"{_state(sweep)}; rapp did not take the points: {error}") from error


def _state(sweep: Sweep) -> str:
    done = f"{sweep.done_count} of {sweep.total_count} configurations of {sweep.spec.name} are in {sweep.file.path}"
    if not sweep.missing:
        return done if sweep.measured else f"{done}: nothing was missing"
    return f"{done}; the same command again measures the {len(sweep.missing)} that are missing"


def _document(sweep: Sweep, taken_count: int | None) -> dict[str, Any]:
    return {
        "function": sweep.spec.name,
        "node": sweep.place.node,
        "gpu": sweep.place.device.gpu,
        "device_model": sweep.place.device.model,
        "file": str(sweep.file.path),
        "total_count": sweep.total_count,
        "done_count": sweep.done_count,
        "measured_count": len(sweep.measured),
        "complete": not sweep.missing,
        "ingested_count": taken_count,
        "points": [asdict(row) for row in sweep.file.rows()],
    }
