"""`hasgpu whatif` and `events`: where instances would go, and what the scheduler did."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import click
from hasgpu_core.errors import InvalidError

from hasgpu_cli.client import CALL_TIMEOUT_S, Target
from hasgpu_cli.options import json_option, print_json, run, target_options
from hasgpu_cli.proto_json import to_plain

ADD_FORM = "NAME,sm=25,quota=30[,limit=60][,memory=512][,count=1][,standby]"
MOST_COUNT = 20_000


@dataclass(frozen=True, slots=True)
class Add:
    """Instances to suppose."""

    function: str
    sm_pct: int
    request_permille: int
    limit_permille: int
    memory_mib: int = 512
    count: int = 1
    standby: bool = False


@click.command("whatif")
@click.option("--add", "added", multiple=True, metavar=ADD_FORM, help="Instances as if wanted too; may be repeated.")
@click.option("--lose-node", "nodes", multiple=True, metavar="NODE", help="A node as if lost; may be repeated.")
@click.option("--lose-gpu", "gpus", multiple=True, metavar="NODE/GPU", help="A device as if lost; may be repeated.")
@click.option("--drop", "functions", multiple=True, metavar="NAME", help="A function as if deleted; may be repeated.")
@json_option
@target_options("scheduler")
def whatif_command(
    target: Target,
    added: tuple[str, ...],
    nodes: tuple[str, ...],
    gpus: tuple[str, ...],
    functions: tuple[str, ...],
    as_json: bool,
) -> None:
    """Ask where instances would go, what would not fit and why, and how many GPUs that takes. Changes nothing.

    Shares are in per cent (sm: of the SMs, quota: of the device's time), memory is in MiB:

        hasgpu whatif --add resnet50,sm=25,quota=30,memory=2048,count=4

        hasgpu whatif --lose-node node1
    """
    adds = [parse_add(text) for text in added]
    if not (adds or nodes or gpus or functions):
        raise click.UsageError("nothing to suppose: give --add, --lose-node, --lose-gpu or --drop")
    answer = run(what_if(target, adds, nodes=nodes, gpus=gpus, functions=functions))
    if as_json:
        print_json(answer)
        return
    for line in describe(answer):
        click.echo(line)


async def what_if(
    target: Target, adds: list[Add], *, nodes: tuple[str, ...], gpus: tuple[str, ...], functions: tuple[str, ...]
) -> dict[str, Any]:
    """Asks the scheduler."""
    from hasgpu.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc

    request = scheduler_pb2.WhatIfManyRequest(lose_nodes=nodes, lose_gpus=gpus, drop_functions=functions)
    for item in adds:
        one = request.add.add(function=item.function, count=item.count, standby=item.standby)
        one.allocation.sm_pct = item.sm_pct
        one.allocation.request_permille = item.request_permille
        one.allocation.limit_permille = item.limit_permille
        one.allocation.memory_bytes = item.memory_mib << 20
    async with target.channel("scheduler") as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        return to_plain(await stub.WhatIfMany(request, timeout=CALL_TIMEOUT_S))


def describe(answer: dict[str, Any]) -> list[str]:
    """The answer in lines."""
    lines = []
    for item in answer["placed"]:
        came = f" from {item['from']}" if item["from"] else ""
        where = f"{item['node']}/{item['gpu']} row {item['row']}"
        lines.append(f"{item['instance']} would go{came} to {where}: {item['reason']}")
    lines += [f"{item['instance']['instance']} would NOT fit: {item['reason']}" for item in answer["unplaced"]]
    if not lines:
        lines.append("nothing would move")
    if answer["interrupted_functions"]:
        names = ", ".join(answer["interrupted_functions"])
        lines.append(f"interrupted, all their instances being lost at once: {names}")
    lines.append(
        f"GPUs used: {answer['gpus_used_before']} now, {answer['gpus_used_after']} then, of {answer['gpus_total']}; "
        f"no placement could do with fewer than {answer['gpus_needed_at_least']}"
    )
    return lines


def parse_add(text: str) -> Add:
    """Reads `NAME,sm=25,quota=30,...`; raises InvalidError naming the part that can't be."""
    name, *parts = (part.strip() for part in text.split(","))
    values: dict[str, str] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if key not in ("sm", "quota", "limit", "memory", "count", "standby") or bool(equals) == (key == "standby"):
            raise InvalidError(f"--add {text!r}", expected=ADD_FORM, got=repr(part))
        values[key] = value
    for needed in ("sm", "quota"):
        if not name or needed not in values:
            raise InvalidError(f"--add {text!r}", expected=ADD_FORM, got=f"no {needed}" if name else "no name")
    request = _number(text, "quota", values["quota"], 0.1, 100, 10)
    return Add(
        function=name,
        sm_pct=_number(text, "sm", values["sm"], 1, 100),
        request_permille=request,
        limit_permille=_number(text, "limit", values["limit"], 0.1, 100, 10) if "limit" in values else request,
        memory_mib=_number(text, "memory", values.get("memory", "512"), 1, 1 << 30),
        count=_number(text, "count", values.get("count", "1"), 1, MOST_COUNT),
        standby="standby" in values,
    )


def _number(text: str, key: str, value: str, low: float, high: float, factor: int = 1) -> int:
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    whole = round(number * factor) if low <= number <= high else None
    if whole is None or abs(whole - number * factor) > 1e-9:
        digits = "" if factor > 1 else "a whole number, "
        raise InvalidError(f"--add {text!r}, {key}", expected=f"{digits}{low:g}..{high:g}", got=repr(value))
    return whole


@click.command("events")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 1_000), help="Newest so many.")
@json_option
@target_options("scheduler")
def events_command(target: Target, limit: int, as_json: bool) -> None:
    """Show what the scheduler placed, moved and could not place lately, and the moves under way; newest last."""
    answer = run(scheduling_events(target, limit))
    if as_json:
        print_json(answer)
        return
    for item in answer["events"]:
        at = datetime.fromtimestamp(item["unix_ns"] / 1e9, UTC).strftime("%H:%M:%S")
        click.echo(f"{at} {item['kind']:<13} {item['reason']}")
    for move in answer["moves"]:
        click.echo(f"under way: {move['instance']} from {move['from']} to {move['to']} ({move['reason']})")
    if not answer["events"] and not answer["moves"]:
        click.echo("nothing yet" if answer["leader"] else "this scheduler does not lead: another one decides")


async def scheduling_events(target: Target, limit: int) -> dict[str, Any]:
    """Asks the scheduler."""
    from hasgpu.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc

    async with target.channel("scheduler") as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        request = scheduler_pb2.GetSchedulingEventsRequest(limit=limit)
        return to_plain(await stub.GetSchedulingEvents(request, timeout=CALL_TIMEOUT_S))
