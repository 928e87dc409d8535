"""`hasgpu scale` and `explain`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from hasgpu_core.errors import InvalidError

from hasgpu_cli.client import CALL_TIMEOUT_S, Target
from hasgpu_cli.options import json_option, print_json, run, target_options
from hasgpu_cli.proto_json import to_plain


@click.command("scale")
@click.argument("name")
@click.option("--instance", default="", help="One instance [all of the function].")
@click.option("--quota", "quota_pct", type=float, help="Guaranteed share of the device's time in per cent.")
@click.option("--limit", "limit_pct", type=float, help="Share up to which idle time may be used, in per cent.")
@click.option("--instances", type=click.IntRange(min=0), help="Number of instances.")
@click.option("--hold", "hold_s", default=60, show_default=True, help="Seconds before the policy takes over again.")
@json_option
@target_options("scaler")
def scale_command(
    target: Target,
    name: str,
    instance: str,
    quota_pct: float | None,
    limit_pct: float | None,
    instances: int | None,
    hold_s: int,
    as_json: bool,
) -> None:
    """Set shares or the number of instances of a function by hand, for a while. Nothing restarts."""
    from hasgpu_cli.status import share

    if quota_pct is None and limit_pct is None and instances is None:
        raise click.UsageError("nothing to do: give --quota, --limit or --instances")
    changes = {"request_permille": _permille("--quota", quota_pct), "limit_permille": _permille("--limit", limit_pct)}
    given = {key: value for key, value in (*changes.items(), ("instances", instances)) if value is not None}
    state = run(manual_scale(target, name, instance=instance, hold_s=hold_s, **given))
    if as_json:
        print_json(state)
        return
    click.echo(f"{name}: wanted from revision {state['revision']} on, held for {hold_s} s")
    for item in state["instances"]:
        click.echo(f"  {item['instance']}  {share(item['allocation'])}{'  standby' if item['standby'] else ''}")


async def manual_scale(target: Target, function: str, *, instance: str, hold_s: int, **given: int) -> dict[str, Any]:
    """Asks the scaler; returns the desired state."""
    from hasgpu.scaler.v1 import scaler_pb2, scaler_pb2_grpc

    async with target.channel("scaler") as channel:
        stub = scaler_pb2_grpc.ScalerServiceStub(channel)
        request = scaler_pb2.ManualScaleRequest(function=function, instance=instance, hold_s=hold_s, **given)
        answer = await stub.ManualScale(request, timeout=CALL_TIMEOUT_S)
    return to_plain(answer.state)


def _permille(option: str, pct: float | None) -> int | None:
    if pct is None:
        return None
    if not 0.1 <= pct <= 100:
        raise InvalidError(option, expected="0.1..100 per cent", got=f"{pct:g}")
    return round(pct * 10)


@click.command("explain")
@click.argument("name")
@click.option("--all", "include_idle", is_flag=True, help="Also the decisions that changed nothing.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 10_000), help="Newest so many.")
@click.option("--at", "at_text", metavar="TIME", help="What was seen then and why: 14:03:20 (UTC), ISO 8601, -90s.")
@click.option("--recording", "file", type=click.Path(path_type=Path), help="With --at: of this file, not the live one.")
@json_option
@target_options("scaler")
def explain_command(
    target: Target, name: str, include_idle: bool, limit: int, at_text: str | None, file: Path | None, as_json: bool
) -> None:
    """Show the last scaling decisions of a function, newest last, and why they were made.

    With --at TIME: the decision that held then, what the scaler saw when it made it (demand, instances, predictions,
    free room), and the decisions before and after. It comes from the recording that the scaler keeps.
    """
    if at_text is not None:
        from hasgpu_cli.recordings import explain_at

        click.echo(explain_at(target, name, at_text, file=file, as_json=as_json))
        return
    if file is not None:
        raise click.UsageError("--recording goes with --at")
    decisions = run(explain(target, name, limit=limit, include_idle=include_idle))
    if as_json:
        print_json(decisions)
        return
    if not decisions:
        click.echo(f"no decision {'' if include_idle else 'that changed something '}yet for {name}")
    for decision in reversed(decisions):
        click.echo(_describe(decision))


async def explain(target: Target, function: str, *, limit: int, include_idle: bool) -> list[dict[str, Any]]:
    """Returns the last decisions, newest first."""
    from hasgpu.scaler.v1 import scaler_pb2, scaler_pb2_grpc

    async with target.channel("scaler") as channel:
        stub = scaler_pb2_grpc.ScalerServiceStub(channel)
        request = scaler_pb2.ExplainDecisionsRequest(function=function, limit=limit, include_idle=include_idle)
        answer = await stub.ExplainDecisions(request, timeout=CALL_TIMEOUT_S)
    return [to_plain(decision) for decision in answer.decisions]


def describe_action(action: dict[str, Any]) -> str:
    """One action in words."""
    kind = action["kind"].replace("_", " ")
    return (
        f"{kind} {action['instance']}: SM {action['sm_pct']} %, "
        f"{action['from_permille'] / 10:g} → {action['to_permille'] / 10:g} %"
    )


def _describe(decision: dict[str, Any]) -> str:
    at = datetime.fromtimestamp(decision["decided_unix_ns"] / 1e9, tz=UTC).strftime("%H:%M:%S")
    p95 = f"{decision['p95_ms']} ms" if decision["p95_ms"] else "-"
    lines = [
        f"{at} r{decision['revision']} {decision['origin']} ({decision['policy']}): {decision['reason']}",
        f"    observed {decision['observed_rps']:.1f}, predicted {decision['predicted_rps']:.1f}, "
        f"capacity {decision['capacity_rps']:.1f} requests/s; queued {decision['queued_count']}; "
        f"p95 {p95}, SLO {decision['slo_ms']} ms",
    ]
    return "\n".join([*lines, *(f"    {describe_action(action)}" for action in decision["actions"])])
