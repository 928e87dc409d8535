"""What the commands show of devices: how they are shared, how they are, and what their drivers measure."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from hasgpu_core.errors import HasgpuError

from hasgpu_cli.client import readable_errors
from hasgpu_cli.proto_json import to_plain

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

TELEMETRY_TIMEOUT_S = 2.0
NOT_TOLD = "-"


def sharing(device: dict[str, Any]) -> str:
    """How a device is shared, in words; empty for one without a mode of its own."""
    parts = [f"shared by {device['mode']}"] if device.get("mode") else []
    if device.get("sm_count"):
        parts.append(f"{device['sm_count']} SMs")
    if device.get("sm_granule_pct", 0) > 1:
        parts.append(f"SM shares are rounded up to its rungs, {device['sm_granule_pct']} % the least")
    if device.get("uuid"):
        parts.append(device["uuid"])
    return ", ".join(parts)


def trouble(device: dict[str, Any]) -> str:
    """What is wrong with a device, as rich markup; empty: nothing."""
    from rich.markup import escape

    health = device.get("health") or "ok"
    if health in ("ok", "unspecified"):
        return ""
    mark = "[red]PROBLEM LOST[/]" if health == "lost" else f"[yellow]{health}[/]"
    return f"{mark} {escape(device.get('health_reason') or 'no reason was given')}"


async def fetch_telemetry(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    """Asks the nodes' agents for what they measured last; of a node that does not answer what is known of its devices.

    Args:
        cluster: The scheduler's view (`status.fetch_cluster`).
    """
    nodes = [node for node in cluster["nodes"] if node["alive"]]
    found = await asyncio.gather(*(_telemetry(node) for node in nodes))
    return [event for events in found for event in events]


async def _telemetry(node: dict[str, Any]) -> list[dict[str, Any]]:
    from hasgpu.node_agent.v1 import node_agent_pb2, node_agent_pb2_grpc
    from hasgpu_runtime.rpc import open_channel

    try:
        with readable_errors("node agent", node["address"]):
            async with open_channel(node["address"]) as channel:
                stub = node_agent_pb2_grpc.NodeAgentServiceStub(channel)
                answer = await stub.GetStatus(node_agent_pb2.GetStatusRequest(), timeout=TELEMETRY_TIMEOUT_S)
    except HasgpuError:
        return [{"device": item["device"], "rows": item["rows"]} for item in node["devices"]]
    return [to_plain(event) for event in answer.devices]


def device_table(events: list[dict[str, Any]]) -> Table:
    """One line a device; what a driver does not tell is a dash, and what no driver tells has no column."""
    from rich.table import Table
    from rich.text import Text

    columns = ("device", "model", "shared by", "health", "rows", "promised", "in use", "kernels", "power", "clock", "")
    lines: list[tuple[str | Text, ...]] = []
    for event in events:
        device = event["device"]
        rows = ", ".join(f"{row['sm_pct']} % × {row['used_permille'] / 10:g} %" for row in event["rows"])
        health = trouble(device)
        lines.append(
            (
                f"{device['node']}/{device['gpu']}",
                device["model"],
                device["mode"] or device["backend"],
                Text.from_markup(health) if health else "ok",
                rows or NOT_TOLD,
                _figure(event.get("memory_used_bytes"), 1 / 2**30, ".1f", "GiB"),
                _figure(event.get("measured_memory_bytes"), 1 / 2**30, ".1f", "GiB"),
                _figure(event.get("utilisation_pct"), 1, ".0f", "%"),
                _figure(event.get("power_mw"), 1e-3, ".0f", "W"),
                _figure(event.get("sm_clock_mhz"), 1, ".0f", "MHz"),
                _figure(event.get("temperature_c"), 1, ".0f", "°C"),
            )
        )
    told = [index for index in range(len(columns)) if any(line[index] != NOT_TOLD for line in lines)]
    table = Table(*(columns[index] for index in told), box=None)
    for line in lines:
        table.add_row(*(line[index] for index in told))
    return table


def _figure(value: int | None, factor: float, form: str, unit: str) -> str:
    return NOT_TOLD if value is None else f"{value * factor:{form}} {unit}"
