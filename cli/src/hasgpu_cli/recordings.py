"""Recordings of the scaler: fetching them, and saying what was seen at a time and why something was done."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from hasgpu_core.cluster import ClusterSnapshot, FunctionView
from hasgpu_core.errors import InvalidError, NotFoundError
from hasgpu_core.observe import ClusterObserver
from hasgpu_core.policy.scaling import Decision
from hasgpu_core.recording import RecordedInput, RecordedLoad, RecordedTick, plain
from hasgpu_sim.recording import apply, read_recording, read_recording_bytes

from hasgpu_cli.client import Target
from hasgpu_cli.options import run

FETCH_TIMEOUT_S = 120.0
_AGO = re.compile(r"-(\d+(?:\.\d+)?)(s|m|h|min)?")
_UNITS_S = {None: 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
MOST_DEVICES = 12


@dataclass(frozen=True, slots=True)
class Seen:
    """One decision and what it was made from."""

    decision: Decision
    at_unix_ns: int
    advised: bool
    policy: str
    view: FunctionView | None
    snapshot: ClusterSnapshot


def parse_time(text: str, now_unix_s: float | None = None) -> int:
    """Returns a time in unix nanoseconds: `-90s` (ago), `14:03:20[.5]` (UTC, within the last day), ISO 8601.

    Raises InvalidError.
    """
    now_s = time.time() if now_unix_s is None else now_unix_s
    if ago := _AGO.fullmatch(text.strip()):
        return round((now_s - float(ago[1]) * _UNITS_S[ago[2]]) * 1e9)
    now = datetime.fromtimestamp(now_s, tz=UTC)
    try:
        if re.match(r"\d{1,2}:\d\d", text.strip()):
            clock = datetime.strptime(text.strip(), "%H:%M:%S.%f" if "." in text else "%H:%M:%S").time()  # noqa: DTZ007  a time of day, put together with a date below
            found = datetime.combine(now.date(), clock, tzinfo=UTC)
            if found > now + timedelta(minutes=1):
                found -= timedelta(days=1)
        else:
            found = datetime.fromisoformat(text.strip())
            found = found if found.tzinfo is not None else found.replace(tzinfo=UTC)
    except ValueError as error:
        raise InvalidError("TIME", expected="14:03:20 (UTC), an ISO 8601 time, or -90s", got=repr(text)) from error
    return round(found.timestamp() * 1e9)


async def fetch(target: Target, from_unix_ns: int, to_unix_ns: int) -> bytes:
    """Returns the segments of the live scaler that hold a stretch of time; raises NotFoundError, UnavailableError."""
    from hasgpu.scaler.v1 import scaler_pb2, scaler_pb2_grpc

    request = scaler_pb2.ReadRecordingRequest(from_unix_ns=from_unix_ns, to_unix_ns=to_unix_ns)
    async with target.channel("scaler") as channel:
        stub = scaler_pb2_grpc.ScalerServiceStub(channel)
        return b"".join([part.data async for part in stub.ReadRecording(request, timeout=FETCH_TIMEOUT_S)])


def summary(path: Path) -> str:
    """Says what a recording's file holds; raises InvalidError."""
    load = read_recording(path)
    ticks = list(load.ticks)
    if not ticks:
        return "no pass of the scaler"
    policies = ", ".join(dict.fromkeys(tick.policy or "unknown" for tick in ticks))
    actions = Counter(a.kind.value for tick in ticks for d in tick.decisions for a in d.actions)
    functions = {d.function for tick in ticks for d in (*tick.decisions, *tick.advised)}
    done = ", ".join(f"{kind} {count}" for kind, count in sorted(actions.items())) or "no action"
    return (
        f"{_clock(load, ticks[0].at_s)} to {_clock(load, ticks[-1].at_s)} UTC, {len(ticks)} passes of {policies}, "
        f"{len(functions)} functions; {done}"
    )


def explain_at(target: Target, function: str, at_text: str, *, file: Path | None, as_json: bool) -> str:
    """Returns in words (or JSON) what was seen at a time and why; raises InvalidError, NotFoundError."""
    at_ns = parse_time(at_text)
    load = read_recording(file) if file is not None else read_recording_bytes(run(fetch(target, at_ns, at_ns)))
    seen, later = look(load, function, at_ns)
    if as_json:
        value = {
            "decided_unix_ns": seen.at_unix_ns,
            "policy": seen.policy,
            "advisory": seen.advised,
            "decision": plain(seen.decision),
            "view": None if seen.view is None else plain(seen.view) | {"tables": sorted(seen.view.tables)},
            "devices": plain(seen.snapshot.devices),
        }
        return json.dumps(value, indent=2)
    return "\n".join(_words(seen, at_ns, later))


def look(load: RecordedLoad, function: str, at_ns: int) -> tuple[Seen, Seen | None]:
    """Returns the last decision of a function at or before a time with what it was made from, and the next that acted.

    Raises NotFoundError: none is recorded; says of what time and functions there are.
    """
    ticks = [(load.unix_offset_ns + round(tick.at_s * 1e9), tick) for tick in load.ticks]
    if not ticks:
        raise NotFoundError("decision", function, "the recording has no pass")
    mine = [
        (unix_ns, tick, decision, advised)
        for unix_ns, tick in ticks
        for advised, decisions in ((False, tick.decisions), (True, tick.advised))
        for decision in decisions
        if decision.function == function
    ]
    before = [one for one in mine if one[0] <= at_ns]
    if not before:
        known = sorted({d.function for _, tick in ticks for d in (*tick.decisions, *tick.advised)})
        raise NotFoundError(
            "decision",
            function,
            f"recorded are {', '.join(known) or 'no functions'}, {_at(ticks[0][0])} to {_at(ticks[-1][0])} UTC",
        )
    after = next((one for one in mine if one[0] > at_ns and one[2].actions), None)
    return _seen(load, *before[-1]), _seen(load, *after) if after is not None else None


def _seen(load: RecordedLoad, unix_ns: int, tick: RecordedTick, decision: Decision, advised: bool) -> Seen:
    """Puts together what was seen at a pass: all inputs before it, and what earlier passes made desired."""
    observer = ClusterObserver()
    for entry in load.entries:
        if isinstance(entry, RecordedInput):
            apply(observer, entry.event, entry.at_s)
            continue
        if entry is tick:
            break
        for made in entry.decisions:
            observer.set_desired(made.function, made.desired, made.next_ordinal)
    snapshot = observer.snapshot(tick.at_s)
    view = next((view for view in snapshot.functions if view.spec.name == decision.function), None)
    return Seen(decision, unix_ns, advised, tick.policy, view, snapshot)


def _words(seen: Seen, at_ns: int, later: Seen | None) -> list[str]:
    decision, view = seen.decision, seen.view
    before_s = (at_ns - seen.at_unix_ns) / 1e9
    done = "advises (advisory mode: nothing is done)" if seen.advised else "decided"
    lines = [
        f"{_at(seen.at_unix_ns)} UTC ({before_s:.2f} s before): {seen.policy or 'the policy'} {done}",
        f"  why: {decision.reason}",
        *(f"  does: {_action(action)}" for action in decision.actions),
    ]
    if not decision.actions:
        lines.append("  does: nothing")
    if view is not None:
        lines += ["saw:", *(f"  {line}" for line in _saw(view, decision))]
    lines += [f"  {line}" for line in _devices(seen.snapshot)]
    if later is not None:
        lines.append(f"next that changes something: {_at(later.at_unix_ns)} UTC: {later.decision.reason}")
    return lines


def _saw(view: FunctionView, decision: Decision) -> list[str]:
    demand, spec = view.demand, view.spec
    rate = "no data" if demand.rate_rps is None else f"{demand.rate_rps:.1f} items/s"
    predicted = "-" if decision.predicted_rps is None else f"{decision.predicted_rps:.1f}"
    p95 = "-" if demand.p95_s is None else f"{demand.p95_s * 1e3:.0f} ms"
    lines = [
        f"demand {rate} ({demand.age_s:.2f} s old); planned for {predicted}, capacity {decision.capacity_rps:.1f}; "
        f"{demand.queued_items_count} in line (oldest {demand.oldest_wait_s * 1e3:.0f} ms), "
        f"{demand.in_flight_count} at instances; p95 {p95}, SLO {spec.slo_ms} ms",
        f"{len(view.instances)} instances ({spec.min_instances}..{spec.max_instances}, {spec.standby} standby)"
        + ("; held by hand" if view.held else "")
        + ("; advisory mode" if spec.advisory else ""),
    ]
    for item in view.instances:
        share = item.allocation
        where = f"{item.node}/{item.gpu} row {item.row}" if item.node else "not bound"
        force = (
            "" if item.in_force_permille in (None, share.request_permille) else f", {item.in_force_permille} in force"
        )
        state = item.state.value + (", standby" if item.standby else "") + (f" ({item.reason})" if item.reason else "")
        quota = f"{share.request_permille} to {share.limit_permille} ‰{force}"
        lines.append(f"  {item.instance}: {state}, {where}, SM {share.sm_pct} %, {quota}")
    for model, table in sorted(view.tables.items()):
        best = max((p.capacity_rps for p in table.points), default=0.0)
        problem = f"; {table.infeasible_reason}" if table.infeasible_reason else ""
        lines.append(
            f"prediction for {model}: {table.basis}, version {table.version}, corrected by "
            f"{table.correction_permille / 1e3:.2f}, at most {best:.1f} items/s{problem}"
        )
    if not view.tables:
        lines.append("no prediction")
    return lines


def _devices(snapshot: ClusterSnapshot) -> list[str]:
    lines = []
    for device in snapshot.devices[:MOST_DEVICES]:
        rows = ", ".join(f"SM {row.sm_pct} %: {row.used_permille} ‰" for row in device.rows) or "no rows"
        lines.append(
            f"{device.info.node}/{device.info.gpu}: {rows}; {device.free_sm_pct} % of the SMs in no row, "
            f"{device.free_memory_bytes >> 20} MiB free"
        )
    if len(snapshot.devices) > MOST_DEVICES:
        lines.append(f"and {len(snapshot.devices) - MOST_DEVICES} more devices")
    return lines


def _action(action: object) -> str:
    from hasgpu_cli.commands.scaling import describe_action

    return describe_action(plain(action))


def _at(unix_ns: int) -> str:
    return datetime.fromtimestamp(unix_ns / 1e9, tz=UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


def _clock(load: RecordedLoad, at_s: float) -> str:
    return _at(load.unix_offset_ns + round(at_s * 1e9))
