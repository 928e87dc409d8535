"""Starting and stopping a system: what `hasgpu up`, `hasgpu down` and the demo share."""

from __future__ import annotations

import asyncio
import collections
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hasgpu_core.errors import HasgpuError, UnavailableError

from hasgpu_cli.client import Target
from hasgpu_cli.home import Home, RunRecord, read_run_record, write_json
from hasgpu_cli.processes import find_leftovers, stop_processes
from hasgpu_cli.stack import Stack, assign_ports, devices_setting, log_path, metrics_targets, read_stack, write_stack
from hasgpu_cli.status import fetch_cluster, probe

READY_WITHIN_S = 90.0
STOP_WITHIN_S = 60.0
POLL_S = 0.2
TAIL_LINES = 12
HOPELESS_AFTER = 5
"""Starts of one process that ended: a setting that it refuses will not be taken the next time."""


class StartError(HasgpuError):
    """The system did not come up; the message names what is missing and shows the ends of the logs."""


def running(home: Home) -> RunRecord | None:
    """The run record, when its supervisor is alive."""
    record = read_run_record(home)
    return record if record is not None and record.supervisor.find() is not None else None


def start(home: Home, stack: Stack, *, foreground: bool = False) -> subprocess.Popen[bytes]:
    """Starts the supervisor of a home in which none runs; what an earlier one left behind is ended first."""
    stack.validate()
    home.path.mkdir(parents=True, exist_ok=True)
    for folder in (home.logs, home.state, home.brokers):
        folder.mkdir(mode=0o700, exist_ok=True)  # what callers sent, and what was deployed
    _end_leftovers(home)
    stack = assign_ports(stack, before=read_stack(home).ports)
    write_stack(home, stack)
    write_json(home.targets_file, metrics_targets(stack))
    log = log_path(home, "supervisor")
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "hasgpu_cli.supervise", "--home", str(home.path)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=not foreground,
        )


async def wait_until_ready(
    home: Home,
    supervisor: subprocess.Popen[bytes],
    *,
    within_s: float = READY_WITHIN_S,
    on_progress: Callable[[dict[str, str]], None] = lambda missing: None,
) -> RunRecord:
    """Waits until every process runs, every service is serving and every node has been heard of.

    Args:
        home: The system's.
        supervisor: As `start` returned it.
        within_s: The bound.
        on_progress: Called with what is missing, by unit, whenever that may have changed.

    Raises:
        StartError: Naming what is missing, with the last lines of its log.
    """
    until_s = time.monotonic() + within_s
    missing: dict[str, str] = {"supervisor": "starting"}
    while time.monotonic() < until_s:
        if supervisor.poll() is not None:
            missing = {"supervisor": f"ended with status {supervisor.returncode}"}
            break
        record = running(home)
        if record is not None and record.supervisor.pid == supervisor.pid:
            missing = await _missing(home, record)
            if not missing:
                on_progress(missing)
                return record
            if hopeless := [unit.name for unit in record.units.values() if unit.restarts_count >= HOPELESS_AFTER]:
                raise StartError(_failure(home, {name: missing.get(name, "") for name in hopeless}, "it keeps ending"))
        on_progress(missing)
        await asyncio.sleep(POLL_S)
    raise StartError(_failure(home, missing, f"not ready within {within_s:.0f} s"))


def stop(home: Home) -> int:
    """Stops everything of a home, whoever started it; blocks until all are gone.

    Returns:
        How many processes the supervisor had not ended itself.

    Raises:
        UnavailableError: Something does not end.
    """
    record = running(home)
    if record is not None and (process := record.supervisor.find()) is not None:
        process.send_signal(signal.SIGTERM)
        until_s = time.monotonic() + STOP_WITHIN_S
        while record.supervisor.find() is not None:
            if time.monotonic() > until_s:
                stop_processes([process], grace_s=1.0)
                break
            time.sleep(POLL_S)
    ended = _end_leftovers(home, workers=True)
    if left := find_leftovers(home.path):
        raise UnavailableError(f"these processes do not end: {', '.join(str(process.pid) for process in left)}")
    home.run_file.unlink(missing_ok=True)
    return ended


def endpoints(record: RunRecord) -> dict[str, str]:
    """What a user connects to."""
    return {"gateway": record.address("gateway"), "nats": record.nats_url, "redis": record.redis_url}


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a text file; none when it can't be read."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return [line.rstrip("\n") for line in collections.deque(file, maxlen=lines)]
    except OSError:
        return []


async def _missing(home: Home, record: RunRecord) -> dict[str, str]:
    missing = {}
    asked = []
    for unit in record.units.values():
        if unit.process is None:
            times = f" (tried {unit.restarts_count} times: {unit.reason})" if unit.restarts_count else ""
            missing[unit.name] = f"{unit.state}{times}"
        elif unit.kind == "service":
            asked.append(unit)
    for unit, health in zip(asked, await asyncio.gather(*(probe(unit.address) for unit in asked)), strict=True):
        if health != "serving":
            missing[unit.name] = health
    if not missing:
        try:
            alive = {node["name"] for node in (await fetch_cluster(Target(home, {})))["nodes"] if node["alive"]}
        except HasgpuError as error:
            return {"scheduler": str(error)}
        wanted = {f"node{index}" for index in range(read_stack(home).nodes_count)}
        missing = dict.fromkeys(sorted(wanted - alive), "not heard of yet")
    return missing


def _failure(home: Home, missing: dict[str, str], what: str) -> str:
    lines = [f"{what}: " + "; ".join(f"{name} {why}" for name, why in missing.items())]
    for name in missing:
        unit = name.replace("node", "node-agent-") if name.startswith("node") and "-" not in name else name
        path = log_path(home, unit)
        if shown := tail(path, TAIL_LINES):
            lines += [f"--- the end of {path}:", *shown]
    return "\n".join(lines)


def _end_leftovers(home: Home, *, workers: bool = False) -> int:
    """Ends what a supervisor that is gone left behind, services before brokers; workers only when told to."""
    try:
        record = read_run_record(home)
    except HasgpuError:
        record = None
    ended = 0
    for kind in ("service", "broker"):
        units = record.units.values() if record else ()
        found = [unit.process.find() for unit in units if unit.kind == kind and unit.process]
        alive = [process for process in found if process is not None]
        stop_processes(alive, grace_s=10.0)
        ended += len(alive)
    if workers:
        left = find_leftovers(home.path)
        stop_processes(left, grace_s=5.0)
        ended += len(left)
    home.run_file.unlink(missing_ok=True)
    return ended


def stack_from_options(
    *,
    nodes: int,
    devices: str,
    device: str,
    gpus: int | None,
    profile: Path | None,
    nats_url: str,
    redis_url: str,
    port: int,
    log_level: str,
) -> Stack:
    """The stack that the options of `up` describe; ports are assigned later. Raises InvalidError."""
    return replace(
        Stack(),
        nodes_count=nodes,
        devices=devices_setting(devices, device=device, gpus=gpus, profile=profile),
        nats_url=nats_url,
        redis_url=redis_url,
        gateway_port=port,
        log_level=log_level,
    )
