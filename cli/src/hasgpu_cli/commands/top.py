"""`hasgpu top`."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import click
from hasgpu_core.errors import HasgpuError

from hasgpu_cli.client import Target
from hasgpu_cli.commands.functions import device_share
from hasgpu_cli.options import json_option, make_console, print_json, run, target_options

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

BAR_CELLS = 20
WIDE_COLUMNS = 120
"""A terminal of so many columns has room for bars, and for reasons beside the figures."""


@click.command("top")
@click.option("--period", "period_s", default=1.0, show_default=True, type=click.FloatRange(min=0.1))
@click.option("--count", type=click.IntRange(min=1), help="End after so many tables [only on Ctrl-C].")
@json_option
@target_options("gateway", "scaler", "scheduler")
def top_command(target: Target, period_s: float, count: int | None, as_json: bool) -> None:
    """Watch functions, shares and load live; --json prints one snapshot."""
    if as_json:
        print_json(run(snapshot(target)))
        return
    try:
        run(_watch(target, period_s, count))
    except KeyboardInterrupt:
        return


async def snapshot(target: Target) -> list[dict[str, Any]]:
    """One row a function: its status and the newest decision."""
    from hasgpu_cli.commands.scaling import explain
    from hasgpu_cli.status import fetch_functions

    found = await fetch_functions(target)
    rows = []
    for function in found:
        name = function["spec"]["name"]
        try:
            newest = await explain(target, name, limit=1, include_idle=True)
        except HasgpuError:
            newest = []  # the scaler is away or does not know the function yet; its columns stay empty
        rows.append({"name": name, "function": function, "decision": newest[0] if newest else None})
    return rows


async def _watch(target: Target, period_s: float, count: int | None) -> None:
    from rich.live import Live
    from rich.text import Text

    console = make_console()
    before: dict[str, tuple[float, int]] = {}
    shown = 0
    shows: RenderableType
    with Live(Text("asking"), console=console, auto_refresh=False, transient=not console.is_terminal) as live:
        async with target.session():
            while True:
                try:
                    rows = await snapshot(target)
                    devices = await _devices(target)
                    shows = _table(rows, _busy(rows, before), devices, console.width)
                except HasgpuError as error:
                    if not shown:
                        raise  # nothing is up, or the address is wrong; later it may be a restart
                    shows = Text(str(error), style="red")
                if console.is_terminal:
                    live.update(shows, refresh=True)
                else:
                    console.print(shows)
                shown += 1
                if shown == count:
                    return
                await asyncio.sleep(period_s)


async def _devices(target: Target) -> list[dict[str, Any]]:
    """What the devices measured last; nothing while the scheduler is away."""
    from hasgpu_cli.devices import fetch_telemetry
    from hasgpu_cli.status import fetch_cluster

    try:
        return await fetch_telemetry(await fetch_cluster(target))
    except HasgpuError:
        return []


def _busy(rows: list[dict[str, Any]], before: dict[str, tuple[float, int]]) -> dict[str, float]:
    """Device time used per second by each instance, from two readings of its counter."""
    now_s = time.monotonic()
    busy = {}
    for row in rows:
        for instance in row["function"]["instances"]:
            used_ns = instance["device_time_ns"]
            then_s, then_ns = before.get(instance["instance"], (now_s, used_ns))
            if now_s > then_s and used_ns >= then_ns:
                busy[instance["instance"]] = (used_ns - then_ns) / 1e9 / (now_s - then_s)
            before[instance["instance"]] = (now_s, used_ns)
    return busy


def _table(
    rows: list[dict[str, Any]], busy: dict[str, float], devices: list[dict[str, Any]], width: int
) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from hasgpu_cli.devices import device_table

    wide = width >= WIDE_COLUMNS
    columns = ("function", "state", "share of a device", "req/s", "capacity", "queue", "p95 / SLO ms")
    table = Table(*columns, *(["last reason"] if wide else []))
    for row in rows:
        function, decision = row["function"], row["decision"]
        share = device_share(function)
        cells = min(BAR_CELLS, round(share * BAR_CELLS))
        bar = f"{'█' * cells}{'░' * (BAR_CELLS - cells)} " if wide else ""
        table.add_row(
            row["name"],
            Text(function["condition"]),
            f"{bar}{100 * share:3.0f} %",
            f"{decision['observed_rps']:.1f}" if decision else "-",
            f"{decision['capacity_rps']:.1f}" if decision else "-",
            str(function["queued_count"]),
            f"{(decision and decision['p95_ms']) or '-'} / {function['spec']['slo_ms']}",
            *([_line(decision["reason"] if decision else "")] if wide else []),
        )
    parts: list[RenderableType] = [table]
    if not wide:
        parts += [_line(f"{row['name']}: {row['decision']['reason']}") for row in rows if row["decision"]]
    parts.append(_instances(rows, busy))
    return Group(*parts, device_table(devices)) if devices else Group(*parts)


def _line(text: str) -> Text:
    from rich.text import Text

    return Text(text, overflow="ellipsis", no_wrap=True)


def _instances(rows: list[dict[str, Any]], busy: dict[str, float]) -> Table:
    from rich.table import Table

    details = Table("instance", "state", "where", "SM", "time", "up to", "busy", "batches", box=None)
    for row in rows:
        for instance in row["function"]["instances"]:
            allocation = instance["allocation"] or {"sm_pct": 0, "request_permille": 0, "limit_permille": 0}
            used = busy.get(instance["instance"])
            details.add_row(
                instance["instance"],
                instance["state"] + (" (emulated)" if instance["reason"].startswith("emulated ") else ""),
                f"{instance['node']}/{instance['gpu']} row {instance['row']}",
                f"{allocation['sm_pct']} %",
                f"{allocation['request_permille'] / 10:g} %",
                f"{allocation['limit_permille'] / 10:g} %",
                "-" if used is None else f"{100 * used:.0f} %",
                str(instance["batches_count"]),
            )
    return details
