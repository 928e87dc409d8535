"""What `hasgpu doctor` makes of an installation's answers: findings, each with what to do about it."""

from __future__ import annotations

import importlib.metadata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hasgpu_core.errors import HasgpuError

from hasgpu_cli.client import Target
from hasgpu_cli.home import read_run_record
from hasgpu_cli.proto_json import to_plain

SERVICES = ("gateway", "scheduler", "scaler", "rapp", "node-agent")
OK = "ok"
WARNING = "warning"
FAULT = "fault"
CLOCK_OFFSET_MS = 50.0
"""Two clocks may differ by so much: heartbeats and traces of two hosts are compared by them."""
HEARTBEAT_AGE_MS = 5_000
"""After which the scheduler takes a node for lost."""
ANSWER_TIMEOUT_S = 15.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's."""

    level: str
    """OK, WARNING or FAULT."""
    subject: str
    found: str
    advice: str = ""


async def diagnose(target: Target, *, wait_ms: int) -> list[Finding]:
    """Looks at everything that can be reached through the gateway; never raises for what it is to find out.

    Args:
        target: Which installation.
        wait_ms: How long the services may take to answer.
    """
    findings = [Finding(OK, "hasgpu", f"command of version {version()}")]
    try:
        address = target.address("gateway")
        report = await _ask(target, wait_ms)
    except HasgpuError as error:
        advice = "start it (`hasgpu up`, or `docker compose up`), or name it with --gateway HOST:PORT"
        return [*findings, Finding(FAULT, "gateway", str(error), advice), *_units(target)]
    findings.append(Finding(OK, "gateway", f"reached at {address}"))
    findings += judge(report)
    findings += await _functions(target)
    return findings


def _units(target: Target) -> Iterator[Finding]:
    """The processes that `up` started here and that do not run."""
    record = read_run_record(target.home)
    for unit in record.units.values() if record is not None else ():
        if unit.state != "running":
            reason = f": {unit.reason}" if unit.reason else ""
            yield Finding(FAULT, unit.name, f"{unit.state}{reason}", f"its log: {unit.log}")


def version() -> str:
    """Returns the version of the command."""
    return importlib.metadata.version("hasgpu-cli")


async def _ask(target: Target, wait_ms: int) -> dict[str, Any]:
    from hasgpu.system.v1 import system_pb2, system_pb2_grpc

    async with target.channel("gateway") as channel:
        stub = system_pb2_grpc.SystemServiceStub(channel)
        request = system_pb2.DiagnoseRequest(wait_ms=wait_ms)
        return to_plain(await stub.Diagnose(request, timeout=ANSWER_TIMEOUT_S))


def judge(report: Mapping[str, Any]) -> list[Finding]:
    """Returns the findings of a DiagnoseResponse as plain values."""
    reports = report["reports"]
    return [
        *_services(reports),
        *_clocks(reports),
        *_checks(reports),
        *map(_check, report["checks"]),
        *_nodes(report["nodes"]),
    ]


def _services(reports: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    by_service = defaultdict(list)
    for report in reports:
        by_service[report["service"]].append(report)
    for service in SERVICES:
        found = by_service[service]
        if not found:
            advice = f"see its log: `hasgpu logs {service}`, or `docker compose logs {service}`"
            yield Finding(FAULT, service, "does not answer on the bus", advice)
            continue
        up_s = max(report["received_unix_ns"] - report["started_unix_ns"] for report in found) / 1e9
        processes = "1 process" if len(found) == 1 else f"{len(found)} processes"
        versions = sorted({report["version"] for report in found})
        text = f"{processes} of version {', '.join(versions)}, up for {_duration(up_s)}"
        if versions != [version()]:
            advice = f"this command is of version {version()}: bring all to one version (docs/operations.md, Upgrades)"
            yield Finding(WARNING, service, text, advice)
        else:
            yield Finding(OK, service, text)


def _clocks(reports: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """How far the services' clocks are from the gateway's; what the way there and back leaves open is no fault."""
    worst_ms, worst = 0.0, ""
    for report in reports:
        early_ms = (report["asked_unix_ns"] - report["answered_unix_ns"]) / 1e6
        late_ms = (report["answered_unix_ns"] - report["received_unix_ns"]) / 1e6
        off_ms = max(early_ms, late_ms, 0.0)
        if off_ms >= worst_ms:
            worst_ms, worst = off_ms, f"{report['service']} ({report['instance']})"
    if not reports:
        return
    if worst_ms > CLOCK_OFFSET_MS:
        advice = "run a time service (chrony, ntpd) on every host: heartbeats and traces are compared by the clock"
        yield Finding(FAULT, "clocks", f"{worst} is at least {worst_ms:.0f} ms off the gateway's clock", advice)
    else:
        yield Finding(OK, "clocks", f"agree within {max(worst_ms, 1.0):.0f} ms as far as the answers tell")


def _checks(reports: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """The services' own checks; equal subjects once while all is well, else each that is not."""
    by_subject: dict[str, list[tuple[str, Mapping[str, Any]]]] = defaultdict(list)
    for report in reports:
        for check in report["checks"]:
            by_subject[check["subject"]].append((report["service"], check))
    for found in by_subject.values():
        bad = [(service, check) for service, check in found if _check(check).level != OK]
        if not bad:
            yield _check(found[0][1])
        seen = set()
        for service, check in bad:
            finding = _check(check)
            # Times to answer differ from one service to the next: what is to be done makes two findings one.
            if finding.advice not in seen:
                seen.add(finding.advice)
                yield Finding(finding.level, finding.subject, f"{finding.found} (seen by {service})", finding.advice)


def _check(check: Mapping[str, Any]) -> Finding:
    level = check["level"] if check["level"] in (OK, WARNING) else FAULT
    return Finding(level, check["subject"], check["found"], check["advice"])


def _nodes(nodes: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    for node in nodes:
        subject = f"node {node['node']}"
        age_s = node["heartbeat_age_ms"] / 1e3
        if node["heartbeat_age_ms"] > HEARTBEAT_AGE_MS:
            advice = "see its agent's log, or start it again; what ran there is placed elsewhere meanwhile"
            yield Finding(FAULT, subject, f"heartbeat is {_duration(age_s)} old", advice)
            continue
        state = ", draining" if node["draining"] else ""
        yield Finding(OK, subject, f"at {node['address']}, heartbeat {age_s:.1f} s ago{state}")
        for device in node["devices"]:
            yield _device(node["node"], device)
    if not nodes:
        advice = "start a node agent; without one nothing can be served"
        yield Finding(FAULT, "nodes", "there is none", advice)


def _device(node: str, device: Mapping[str, Any]) -> Finding:
    subject = f"device {node}/{device['gpu']}"
    mode = f", shared by {device['mode']}" if device["mode"] else ""
    can = f"; can: {'; '.join(device['capabilities'])}" if device["capabilities"] else ""
    text = f"{device['model']} ({device['backend']}{mode})"
    health = device["health"] or OK
    if health == "lost":
        advice = "see the agent's log and the driver's (dmesg, nvidia-smi); the GPU may need a reset, the host a reboot"
        return Finding(FAULT, subject, f"{text} is lost: {device['health_reason']}", advice)
    if health != OK:
        return Finding(
            WARNING, subject, f"{text} is {health}: {device['health_reason']}", "it recovers by itself, or is lost"
        )
    if device["mode"] == "timeshare":
        advice = (
            "SM shares are not enforced: is MPS installed, and may the agent start it? `hasgpu status` has the reasons"
        )
        return Finding(WARNING, subject, f"{text}{can}", advice)
    return Finding(OK, subject, f"{text}{can}")


async def _functions(target: Target) -> list[Finding]:
    from hasgpu_cli.status import fetch_functions

    try:
        functions = await fetch_functions(target)
    except HasgpuError as error:
        return [Finding(FAULT, "functions", str(error), "see the gateway's log")]
    found = []
    for function in functions:
        name, text = function["spec"]["name"], function["condition"]
        subject = f"function {name}"
        if text.startswith("failing"):
            advice = f"`hasgpu describe {name}` and `hasgpu logs {name}` have the instance's own words"
            found.append(Finding(FAULT, subject, text, advice))
        else:
            found.append(Finding(OK, subject, text))
    return found or [Finding(OK, "functions", "none is deployed")]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7_200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3_600:.0f} h"
