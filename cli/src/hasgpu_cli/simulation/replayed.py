"""A recording of the live system under other policies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hasgpu_core.errors import InvalidError
from hasgpu_core.resources import DeviceInfo
from hasgpu_sim.arrivals import Process
from hasgpu_sim.evaluate import Settings
from hasgpu_sim.physics import Physics
from hasgpu_sim.recorded import RecordedFunction, RecordedScenario, scenario_of_recording
from hasgpu_sim.recording import read_recording
from hasgpu_sim.scenario import FunctionLoad
from hasgpu_sim.surface import Surface

from hasgpu_cli.simulation.plan import DEFAULT_COLD_START_S, Plan, SimulateOptions
from hasgpu_cli.simulation.runs import BINS_COUNT, SPARSE_ABOVE, Case, Outcome, rate_line

RECORDED = "recorded"


def plan_recording(options: SimulateOptions, path: Path, policies: tuple[str, ...]) -> Plan:
    """Returns the recording's load; beside it what the live system made of it. Raises InvalidError."""
    found = scenario_of_recording(read_recording(path), Process(options.arrivals), options.seed)
    models = sorted({info.model for info in found.devices})
    if len(models) > 1:
        raise InvalidError(f"recording {path}", expected="devices of one model", got=", ".join(models))
    cold_s = options.cold_start_s if options.cold_start_s is not None else found.cold_start_s
    settings = Settings(
        gpus=len(found.devices),
        gpu_memory_mib=min(info.memory_bytes for info in found.devices) >> 20,
        cold_start_s=DEFAULT_COLD_START_S if cold_s is None else cold_s,
        physics=Physics(options.physics),
        lend=options.lend,
        moves=options.moves,
        tick_s=1.0 if len(found.functions) > SPARSE_ABOVE else 0.1,
        seed=options.seed,
    )
    case = _case(path, found, models[0])
    notes = [
        f"recording: {found.duration_s:.0f} s of {', '.join(found.policies)} on {len(found.devices)} x {models[0]}, "
        f"{sum(f.requests for f in found.functions)} requests; devices do what the newest capacity tables say; "
        f"a cold start takes {settings.cold_start_s:.1f} s"
    ]
    if found.left_out:
        notes.append(f"left out, without requests or prediction: {', '.join(found.left_out)}")
    return Plan((case,), policies, settings, tuple(notes), (_as_it_was(case, found, settings),))


def _case(path: Path, found: RecordedScenario, model: str) -> Case:
    loads = tuple(
        FunctionLoad(
            function.spec,
            tuple(table for table in function.tables if table.device_model == model) or function.tables,
            desired=function.desired,
            held=False,
            arrivals_s=function.arrivals_s,
        )
        for function in found.functions
    )
    surface = _surface(found.functions[0], found.devices[0])
    names = [load.spec.name for load in loads]
    return Case(
        path.name,
        loads,
        {name: name for name in names},
        dict.fromkeys(names, 0.0),
        surface,
        found.duration_s,
        path.name,
        "recorded",
        per_function=len(loads) > 1,
    )


def _surface(function: RecordedFunction, info: DeviceInfo) -> Surface:
    """The devices' model and shares; the latencies are those of one function's table."""
    points = function.tables[0].points
    rungs = set(info.sm_rungs_pct)
    cells = {(p.batch, p.sm_pct, p.quota_permille): p.latency_s for p in points if p.sm_pct in rungs}
    return Surface(
        "recorded", info.model, cells or {(p.batch, p.sm_pct, p.quota_permille): p.latency_s for p in points}
    )


def _as_it_was(case: Case, found: RecordedScenario, settings: Settings) -> Outcome:
    """What the live system did; latencies of single requests are in no recording."""
    results = [_live_result(case, found.functions, "", settings)]
    if case.per_function:
        results += [_live_result(case, (f,), f.spec.name, settings) for f in found.functions]
    bin_s = case.duration_s / BINS_COUNT
    lines = {
        "rate": rate_line(case, bin_s),
        "capacity": _summed([f.capacities for f in found.functions]),
        "share": _summed([f.shares for f in found.functions]),
        "violations": _summed([f.violations for f in found.functions]),
    }
    policy = f"{RECORDED} ({', '.join(found.policies)})"
    return Outcome(case, policy, tuple(replace_policy(result, policy) for result in results), lines)


def replace_policy(result: dict[str, Any], policy: str) -> dict[str, Any]:
    """Names the policy of a result."""
    return {**result, "policy": policy}


def _live_result(case: Case, functions: Sequence[RecordedFunction], name: str, settings: Settings) -> dict[str, Any]:
    requests = sum(f.requests for f in functions)
    late = sum(f.late for f in functions)
    dropped = sum(f.refused + f.failed for f in functions)
    answered = sum(f.answered for f in functions)
    gpu_seconds = sum(f.gpu_seconds for f in functions)
    good = max(0, answered - late)
    return {
        "model": name or case.model,
        "slo_multiple": 0.0,
        "trace": case.trace,
        "arrivals": case.arrivals,
        "physics": "live",
        "lend": settings.lend,
        "seed": settings.seed,
        "slo_ms": float(functions[0].spec.slo_ms) if len(functions) == 1 else 0.0,
        "requests": requests,
        "completed": answered,
        "violations": late + dropped,
        "violation_rate": (late + dropped) / requests if requests else 0.0,
        "dropped": dropped,
        "p50_ms": 0.0,
        "p95_ms": 0.0,
        "p99_ms": 0.0,
        "gpu_seconds": gpu_seconds,
        "actions": sum(f.actions for f in functions),
        "gpus_peak": 0,
        "decide_us_p50": 0.0,
        "decide_us_p99": 0.0,
        "cost_per_good": gpu_seconds / good if good else None,
        "function": name,
        "functions": len(functions),
    }


def _summed(lines: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Adds lines that each hold their value until the next point."""
    events = sorted((at_s, index, value) for index, line in enumerate(lines) for at_s, value in line)
    newest = [0.0] * len(lines)
    out = []
    for at_s, index, value in events:
        newest[index] = value
        out.append((at_s, sum(newest)))
    return out
