"""What runs, gathered from the run file and the services, as plain values; and the tree that shows it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from hasgpu_core.errors import HasgpuError

from hasgpu_cli.client import Target
from hasgpu_cli.devices import sharing, trouble
from hasgpu_cli.home import RunRecord, UnitRecord, read_run_record
from hasgpu_cli.proto_json import to_plain

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.tree import Tree

PROBE_TIMEOUT_S = 2.0
WHOLE_PERMILLE = 1_000
WHOLE_PCT = 100


async def probe(address: str) -> str:
    """Asks a service's health; returns "serving", "not serving" or why it can't be asked. Never raises."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from hasgpu_runtime.rpc import open_channel

    try:
        async with open_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(  # type: ignore[attr-defined]  # the stubs of this package lack its methods
                health_pb2.HealthCheckRequest(), timeout=PROBE_TIMEOUT_S
            )
    except grpc.aio.AioRpcError as error:
        return "does not answer" if error.code() is not grpc.StatusCode.UNIMPLEMENTED else "has no health service"
    return "serving" if answer.status == health_pb2.HealthCheckResponse.SERVING else "not serving"


async def gather_status(target: Target) -> dict[str, Any]:
    """Collects the whole status; a service that can't be asked shows as such instead of failing the rest."""
    record = read_run_record(target.home)
    units = list(record.units.values()) if record else []
    healths, cluster, functions, states = await asyncio.gather(
        asyncio.gather(*(_unit_health(unit) for unit in units)),
        _ask(fetch_cluster(target)),
        _ask(fetch_functions(target)),
        _ask(fetch_desired(target)),
    )
    return {
        "home": str(target.home.path),
        "up": record is not None and record.supervisor.find() is not None,
        "supervisor": _supervisor(record),
        "nats_url": record.nats_url if record else "",
        "redis_url": record.redis_url if record else "",
        "units": [_unit(unit, health) for unit, health in zip(units, healths, strict=True)],
        "cluster": cluster,
        "functions": functions,
        "desired": states,
    }


async def fetch_cluster(target: Target) -> dict[str, Any]:
    """The scheduler's view of nodes and devices."""
    from hasgpu.scheduler.v1 import scheduler_pb2, scheduler_pb2_grpc

    async with target.channel("scheduler") as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        return to_plain(await stub.GetCluster(scheduler_pb2.GetClusterRequest(), timeout=PROBE_TIMEOUT_S))


async def fetch_functions(target: Target) -> list[dict[str, Any]]:
    """The gateway's functions with their instances."""
    from hasgpu.gateway.v1 import gateway_pb2, gateway_pb2_grpc

    async with target.channel("gateway") as channel:
        stub = gateway_pb2_grpc.FunctionServiceStub(channel)
        answer = await stub.ListFunctions(gateway_pb2.ListFunctionsRequest(), timeout=PROBE_TIMEOUT_S)
    return [to_plain(function) for function in answer.functions]


async def fetch_desired(target: Target, function: str = "") -> list[dict[str, Any]]:
    """The scaler's desired state."""
    from hasgpu.scaler.v1 import scaler_pb2, scaler_pb2_grpc

    async with target.channel("scaler") as channel:
        stub = scaler_pb2_grpc.ScalerServiceStub(channel)
        request = scaler_pb2.GetDesiredStateRequest(function=function)
        answer = await stub.GetDesiredState(request, timeout=PROBE_TIMEOUT_S)
    return [to_plain(state) for state in answer.states]


async def _ask(coroutine: Any) -> Any:
    try:
        return await coroutine
    except HasgpuError as error:
        return {"error": str(error)}


async def _unit_health(unit: UnitRecord) -> str:
    if unit.process is None or unit.process.find() is None:
        return "not running"
    return "running" if unit.kind == "broker" else await probe(unit.address)


def _unit(unit: UnitRecord, health: str) -> dict[str, Any]:
    return {
        "name": unit.name,
        "kind": unit.kind,
        "address": unit.address,
        "metrics": unit.metrics,
        "state": unit.state,
        "health": health,
        "pid": unit.process.pid if unit.process else None,
        "restarts_count": unit.restarts_count,
        "reason": unit.reason,
        "log": unit.log,
    }


def _supervisor(record: RunRecord | None) -> dict[str, Any] | None:
    if record is None:
        return None
    return {"pid": record.supervisor.pid, "alive": record.supervisor.find() is not None, "stopping": record.stopping}


def render_status(status: dict[str, Any]) -> RenderableType:
    """The tree of `hasgpu status`."""
    from rich.markup import escape
    from rich.tree import Tree

    supervisor = status["supervisor"]
    tree = Tree(f"[bold]hasgpu[/] in {escape(status['home'])}")
    if supervisor is None and "error" in status["cluster"]:
        tree.add("[yellow]not up[/] (`hasgpu up` starts it)")
    elif supervisor is not None and not supervisor["alive"]:
        tree.add("[red]PROBLEM[/] the supervisor is gone; what still runs is not restarted (`hasgpu up` mends it)")
    for title, kind in (("brokers", "broker"), ("services", "service")):
        units = [unit for unit in status["units"] if unit["kind"] == kind]
        if units:
            branch = tree.add(f"[bold]{title}[/]")
            for unit in units:
                branch.add(_unit_line(unit))
    if supervisor is not None or "error" not in status["cluster"]:
        _add_cluster(tree.add("[bold]nodes[/]"), status["cluster"])
        _add_functions(tree.add("[bold]functions[/]"), status["functions"])
    return tree


def _unit_line(unit: dict[str, Any]) -> str:
    from rich.markup import escape

    good = unit["health"] in ("serving", "running")
    mark = "[green]●[/]" if good else "[red]PROBLEM[/]"
    extra = (
        f"  restarted {unit['restarts_count']} times, last: {escape(unit['reason'])}" if unit["restarts_count"] else ""
    )
    metrics = f"  metrics {unit['metrics']}" if unit["metrics"] else ""
    state = unit["health"] if unit["state"] == "running" else f"{unit['state']}, {unit['health']}"
    return f"{mark} {unit['name']:<14} {unit['address']:<22} {state}  [dim]pid {unit['pid'] or '-'}{metrics}[/]{extra}"


def _add_cluster(branch: Tree, cluster: dict[str, Any]) -> None:
    from rich.markup import escape

    if "error" in cluster:
        branch.add(f"[red]PROBLEM[/] {escape(cluster['error'])}")
        return
    for node in cluster["nodes"]:
        mark = "[green]●[/]" if node["alive"] else "[red]PROBLEM NODE LOST[/]"
        draining = " draining" if node["draining"] else ""
        leaf = branch.add(
            f"{mark} {node['name']}{draining}  [dim]heartbeat {node['heartbeat_age_ms'] / 1e3:.1f} s ago[/]"
        )
        for device in node["devices"]:
            _add_device(leaf, device)
    if not cluster["nodes"]:
        branch.add("[yellow]none[/]")
    for unplaced in cluster["unplaced"]:
        name = (unplaced["instance"] or {}).get("instance", "")
        branch.add(f"[red]PROBLEM UNPLACED[/] {escape(name)}: {escape(unplaced['reason'])}")


def _add_device(branch: Tree, status: dict[str, Any]) -> None:
    from rich.markup import escape

    device = status["device"] or {}
    rows = status["rows"]
    free_pct = WHOLE_PCT - sum(row["sm_pct"] for row in rows)
    rungs = ", ".join(map(str, device.get("sm_rungs_pct", [])))
    leaf = branch.add(
        f"{device.get('gpu')}: {device.get('model')} ({device.get('backend')}), "
        f"{device.get('memory_bytes', 0) / 2**30:.1f} GiB, SM in no row: {free_pct} % [dim](rungs {rungs})[/]"
    )
    if how := sharing(device):
        leaf.add(escape(how))
    if wrong := trouble(device):
        leaf.add(wrong)
    for capability in device.get("capabilities", []):
        leaf.add(f"[dim]can: {escape(capability)}[/]")
    for row in rows:
        free = WHOLE_PERMILLE - row["used_permille"]
        row_leaf = leaf.add(f"row {row['index']}: SM {row['sm_pct']} %, {row['used_permille']} ‰ used, {free} ‰ free")
        for instance in status["instances"]:
            if instance["row"] == row["index"]:
                row_leaf.add(f"{instance['instance']}  {share(instance['allocation'])}")


def _add_functions(branch: Tree, functions: Any) -> None:
    from rich.markup import escape

    if isinstance(functions, dict):
        branch.add(f"[red]PROBLEM[/] {escape(functions['error'])}")
        return
    for function in functions:
        spec = function["spec"]
        leaf = branch.add(
            f"{spec['name']}  {condition(function)}  [dim]SLO {spec['slo_ms']} ms, revision {function['revision']}[/]"
        )
        for instance in function["instances"]:
            leaf.add(instance_line(instance))
    if not functions:
        branch.add("[dim]none (`hasgpu deploy examples/minilm/function.yaml`)[/]")


def condition(function: dict[str, Any]) -> str:
    """The function's condition, coloured."""
    from rich.markup import escape

    text = function["condition"]
    if text.startswith("failing"):
        return f"[red]PROBLEM[/] {escape(text)}"
    return f"[green]{escape(text)}[/]" if text == "ready" else f"[yellow]{escape(text)}[/]"


def instance_line(instance: dict[str, Any]) -> str:
    """One instance: where, how large, how it is."""
    from rich.markup import escape

    state = instance["state"]
    colour = {"ready": "green", "failed": "red"}.get(state, "yellow")
    shown = f"[red]PROBLEM {state.upper()}[/]" if state == "failed" else f"[{colour}]{state}[/]"
    reason = f"  {escape(instance['reason'])}" if instance["reason"] else ""
    where = f"{instance['node']}/{instance['gpu']} row {instance['row']}"
    return f"{instance['instance']}  {shown}  {where}  {share(instance['allocation'])}{reason}"


def share(allocation: dict[str, Any] | None) -> str:
    """An allocation in words."""
    if not allocation:
        return "no share"
    request, limit = allocation["request_permille"], allocation["limit_permille"]
    lent = f" (up to {limit / 10:g} %)" if limit > request else ""
    return f"SM {allocation['sm_pct']} % × {request / 10:g} % of the time{lent}"
