"""`hasgpu deploy`, `functions`, `describe` and `delete`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import click
from hasgpu_core.errors import AlreadyExistsError

from hasgpu_cli import functions
from hasgpu_cli.client import Target
from hasgpu_cli.options import json_option, make_console, print_json, run, target_options

WITHIN = click.FloatRange(min=0)


@click.command("deploy")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--replace", is_flag=True, help="Take the place of a function of the same name.")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Wait until it is profiled and ready.")
@click.option("--timeout", "within_s", default=180.0, show_default=True, type=WITHIN, help="Longest wait in seconds.")
@json_option
@target_options("gateway", "rapp")
def deploy_command(target: Target, file: Path, replace: bool, wait: bool, within_s: float, as_json: bool) -> None:
    """Deploy the function that the YAML FILE (or FILE/function.yaml) describes."""
    from hasgpu_cli.spec import read_deployment

    deployment = read_deployment(file / "function.yaml" if file.is_dir() else file)
    name = deployment.spec.name
    artifact = deployment.spec.artifact
    try:
        function = run(functions.deploy(target, deployment, replace=replace))
    except AlreadyExistsError as error:
        raise click.ClickException(f"{error}; --replace takes its place") from error
    if not as_json:
        click.echo(f"{name}: sent {artifact.size_bytes:,} bytes, sha256 {artifact.sha256[:12]}…")
    starts = deployment.spec.min_instances > 0 or not deployment.spec.advisory
    if wait and starts:  # nobody starts an instance of one in advisory mode beyond its minimum
        function = _wait(target, name, within_s, quiet=as_json)
    if as_json:
        print_json(function)
    else:
        click.echo(f"{name}: {function['condition']}, revision {function['revision']}")
        if deployment.spec.advisory:
            click.echo(advisory_words(name, deployment.spec.min_instances))


def advisory_words(name: str, min_instances: int) -> str:
    """What a user of a function in advisory mode has to know, and to do."""
    shown = f"`hasgpu explain {name}` shows what the policy would do"
    if min_instances:
        return f"{name}: advisory mode: its minimum of {min_instances} is kept; {shown}, `hasgpu scale {name}` does it"
    return (
        f"{name}: advisory mode with min: 0: nothing serves it until `hasgpu scale {name} --instances 1` starts an "
        f"instance; {shown}"
    )


def _wait(target: Target, name: str, within_s: float, *, quiet: bool) -> dict[str, Any]:
    from rich.console import Console

    console = Console(stderr=True, quiet=quiet)
    with console.status(f"{name}: starting") as spinner:

        def progress(text: str) -> None:
            spinner.update(f"{name}: {text}")

        return run(functions.wait_until_ready(target, name, within_s=within_s, profiled=True, on_progress=progress))


@click.command("functions")
@json_option
@target_options("gateway")
def functions_command(target: Target, as_json: bool) -> None:
    """List the functions."""
    from hasgpu_cli.status import fetch_functions

    found = run(fetch_functions(target))
    if as_json:
        print_json(found)
        return
    if not found:
        click.echo("no functions; `hasgpu deploy FILE` deploys one")
        return
    from rich.table import Table

    table = Table("function", "condition", "SLO ms", "instances", "share of a device", "format", "revision")
    for function in found:
        spec = function["spec"]
        ready = sum(instance["state"] == "ready" for instance in function["instances"])
        table.add_row(
            spec["name"],
            function["condition"],
            str(spec["slo_ms"]),
            f"{ready} of {len(function['instances'])} ready ({spec['min_instances']}..{spec['max_instances']})",
            f"{100 * device_share(function):.0f} %",
            spec["format"].replace("_", "-"),
            str(function["revision"]),
        )
    make_console().print(table)


def device_share(function: dict[str, Any]) -> float:
    """The part of a device that a function's instances are promised: the sum of SM share times request."""
    allocations = [instance["allocation"] for instance in function["instances"] if instance["allocation"]]
    return float(sum(a["sm_pct"] / 100 * a["request_permille"] / 1_000 for a in allocations))


@click.command("describe")
@click.argument("name")
@json_option
@target_options("gateway", "scaler")
def describe_command(target: Target, name: str, as_json: bool) -> None:
    """Show one function: its spec, instances, capacity and what the scaler wants of it."""
    from hasgpu_cli.status import fetch_desired

    async def both() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        function = await functions.get_function(target, name)
        return function, await fetch_desired(target, name)

    function, desired = run(both())
    if as_json:
        print_json({"function": function, "desired": desired[0] if desired else None})
    else:
        _print_function(function, desired)


def _print_function(function: dict[str, Any], desired: list[dict[str, Any]]) -> None:

    from hasgpu_cli.status import condition, instance_line, share

    console = make_console()
    spec = function["spec"]
    console.print(f"[bold]{spec['name']}[/]  {condition(function)}  revision {function['revision']}")
    model_format = spec["format"].replace("_", "-")
    console.print(f"  {model_format}, entry {spec['entry']}, artifact sha256 {spec['artifact']['sha256']}")
    for kind in ("inputs", "outputs"):
        for tensor in spec[kind]:
            console.print(f"  {kind[:-1]} {tensor['name']}: {tensor['datatype']} {tensor['shape']}", markup=False)
    console.print(
        f"  SLO {spec['slo_ms']} ms for {spec['slo_permille'] / 10:g} % of requests, "
        f"batches up to {spec['max_batch']}, "
        f"{spec['min_instances']}..{spec['max_instances']} instances, {spec['standby']} standby, "
        f"{spec['memory_bytes'] >> 20} MiB, queued now {function['queued_count']}"
    )
    capacity = function["capacity"]
    if capacity:
        note = f", {capacity['infeasible_reason']}" if capacity["infeasible_reason"] else ""
        console.print(
            f"  capacity on a whole {capacity['device_model']}: {capacity['best_millirps'] / 1e3:.1f} requests/s "
            f"({capacity['basis']}, {capacity['age_ms'] / 1e3:.0f} s old{note})"
        )
    for instance in function["instances"]:
        device_s = instance["device_time_ns"] / 1e9
        console.print(f"  {instance_line(instance)}  {instance['batches_count']} batches, {device_s:.1f} s device time")
    for state in desired:
        wanted = ", ".join(
            f"{item['instance']} {share(item['allocation'])}{' standby' if item['standby'] else ''}"
            for item in state["instances"]
        )
        held = " (held by hand)" if state["held_until_unix_ns"] else ""
        console.print(f"  wanted (revision {state['revision']}){held}: {wanted or 'no instance'}")


@click.command("delete")
@click.argument("name")
@json_option
@target_options("gateway")
def delete_command(target: Target, name: str, as_json: bool) -> None:
    """Delete a function; its instances finish what they have and stop."""
    asyncio.run(functions.delete_function(target, name))
    if as_json:
        print_json({"deleted": name})
    else:
        click.echo(f"{name} is deleted")
