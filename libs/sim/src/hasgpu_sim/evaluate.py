"""One run of one policy on one function or many, as figures: what `bench/policy.py` and `hasgpu simulate` report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from hasgpu_core.errors import InvalidError, NotFoundError
from hasgpu_core.function import MIB, FunctionSpec
from hasgpu_core.policy.choice import LIVE_POLICIES, make_live_policy
from hasgpu_core.policy.rivals import StaticPeakPolicy
from hasgpu_core.policy.rivals.clairvoyant import borrowed_bound, reserved_bound
from hasgpu_core.policy.scaling import ScalingPolicy
from hasgpu_core.resources import DeviceInfo

from hasgpu_sim.physics import Physics
from hasgpu_sim.recording import RecordedLoad
from hasgpu_sim.scenario import FunctionLoad, Moving, NodeLoss, Scenario, SimResult, Timing
from hasgpu_sim.simulate import simulate
from hasgpu_sim.surface import Surface, device_time_surface
from hasgpu_sim.synthetic import synthetic_spec
from hasgpu_sim.traces import Trace

POLICIES = ("hybrid", "hasgpu", "hasgpu-released", "fastgshare", "kserve", "static-peak", "clairvoyant")
PEAK_WINDOW_S = 5.0
LEAD_S = 30.0
"""Functions are deployed this long before their first arrival can come."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is the same for all runs that are compared."""

    gpus: int = 8
    gpus_per_node: int = 4
    gpu_memory_mib: int = 16_384
    instance_memory_mib: int = 512
    cold_start_s: float = 6.0
    resize_s: float = 0.02
    tick_s: float = 0.1
    physics: Physics = Physics.TABLE
    lend: bool = True
    """Idle time of a row is lent between request and limit, and paid for by who uses it."""
    max_batch: int = 8
    max_instances: int = 16
    min_instances: int = 1
    timeout_slos: float = 4.0
    """Who has not been answered after so many SLOs (1 s at least) is dropped."""
    seed: int = 0
    losses: tuple[NodeLoss, ...] = ()
    moves: bool = False
    """The scheduler moves instances: to free GPUs, and to make room."""

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise InvalidError("gpus", expected="at least 1", got=str(self.gpus))


@dataclass(frozen=True, slots=True)
class RunResult:
    """The figures of one run; the names are those of the JSON."""

    model: str
    slo_multiple: float
    policy: str
    trace: str
    arrivals: str
    physics: str
    lend: bool
    seed: int
    slo_ms: float
    requests: int
    completed: int
    violations: int
    violation_rate: float
    dropped: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    gpu_seconds: float
    actions: int
    gpus_peak: int
    decide_us_p50: float
    decide_us_p99: float
    cost_per_good: float
    """GPU-seconds per request answered inside its SLO; for clairvoyant a lower bound of it."""

    def as_dict(self) -> dict[str, object]:
        """Returns it as it goes into JSON."""
        return asdict(self)


def slo_ms_of(surface: Surface, multiple: float) -> int:
    """Returns multiple times the latency at batch 1 with the whole device, in whole milliseconds, rounded up."""
    return max(1, math.ceil(multiple * surface.reference_s * 1e3 - 1e-9))


def devices(settings: Settings, surface: Surface) -> tuple[DeviceInfo, ...]:
    """Returns the GPUs, all of the profile's device model."""
    return tuple(
        DeviceInfo(
            node=f"n{i // settings.gpus_per_node:03d}",
            gpu=f"gpu{i % settings.gpus_per_node}",
            model=surface.device_model,
            backend="emulated",
            memory_bytes=settings.gpu_memory_mib * MIB,
            sm_rungs_pct=surface.sm_pcts,
        )
        for i in range(settings.gpus)
    )


def make_policy(name: str, settings: Settings, peaks_rps: Mapping[str, float] | None = None) -> ScalingPolicy:
    """Returns a policy by its name, tuned as the figures have it. Raises NotFoundError, with the names there are."""
    if name == "static-peak":
        return StaticPeakPolicy(peaks_rps or {})
    if name not in LIVE_POLICIES:
        raise NotFoundError("policy", name, f"there are {', '.join(POLICIES)}")
    device_lends = name == "hybrid" and settings.physics is Physics.DEVICE_TIME
    return make_live_policy(name, lend=settings.lend or device_lends)


def function_load(
    name: str, surface: Surface, slo_multiple: float, arrivals_s: Sequence[float], settings: Settings
) -> FunctionLoad:
    """Returns a function of one model with its arrivals.

    Raises:
        InvalidError: No configuration can meet its SLO; says which is the fastest. Or it can't fit into a GPU's memory.
    """
    slo_ms = slo_ms_of(surface, slo_multiple)
    if settings.instance_memory_mib > settings.gpu_memory_mib:
        raise InvalidError(
            f"memory of {name}",
            expected=f"at most a GPU's {settings.gpu_memory_mib} MiB",
            got=f"{settings.instance_memory_mib} MiB",
        )
    spec: FunctionSpec = synthetic_spec(
        name,
        slo_ms=slo_ms,
        max_batch=settings.max_batch,
        max_instances=settings.max_instances,
        min_instances=settings.min_instances,
        timeout_ms=max(1000, round(settings.timeout_slos * slo_ms)),
        memory_bytes=settings.instance_memory_mib * MIB,
    )
    told = device_time_surface(surface) if settings.physics is Physics.DEVICE_TIME else surface
    table = told.table(name, slo_ms)
    if table.infeasible_reason:
        raise InvalidError(f"SLO of {name}", expected="one that some configuration meets", got=table.infeasible_reason)
    return FunctionLoad(spec, (table,), arrivals_s=arrivals_s, surfaces={surface.device_model: surface})


def scenario_of(
    loads: Sequence[FunctionLoad], surface: Surface, duration_s: float, settings: Settings, *, sparse: bool = False
) -> Scenario:
    """Returns what is simulated."""
    timing = Timing(
        tick_s=settings.tick_s,
        demand_period_s=settings.tick_s,
        cold_start_s=settings.cold_start_s,
        resize_s=settings.resize_s,
        telemetry_period_s=4.0 if sparse else 1.0,
    )
    return Scenario(
        devices(settings, surface),
        tuple(loads),
        duration_s,
        settings.seed,
        timing,
        settings.physics,
        lend=settings.lend,
        lead_s=LEAD_S,
        losses=settings.losses,
        moving=Moving() if settings.moves else None,
        sparse=sparse,
        sample_s=0.0 if sparse else 1.0,
    )


def run_one(
    surface: Surface,
    slo_multiple: float,
    trace: Trace,
    arrivals: str,
    policy: str,
    settings: Settings,
    *,
    stopwatch: Callable[[], float] | None = None,
) -> tuple[RunResult, SimResult | None]:
    """Runs one policy on one function; for clairvoyant there is a bound and no simulation."""
    times = next(iter(trace.arrivals_s.values()))
    load = function_load("f", surface, slo_multiple, times, settings)
    if policy == "clairvoyant":
        return _bound(surface, slo_multiple, trace, arrivals, load, settings), None
    chosen = make_policy(policy, settings, {"f": peak_rps(times)})
    outcome = simulate(scenario_of([load], surface, trace.duration_s, settings), chosen, stopwatch=stopwatch)
    return result_of(surface.model, slo_multiple, trace.name, arrivals, policy, settings, outcome), outcome


def result_of(
    model: str, slo_multiple: float, trace: str, arrivals: str, policy: str, settings: Settings, outcome: SimResult
) -> RunResult:
    """Returns the figures of a simulation, of all of its functions together."""
    found = list(outcome.functions.values())
    latencies = sorted(latency for f in found for latency in f.latencies_s)
    requests = sum(f.requests_count for f in found)
    violations = sum(f.violations_count for f in found)
    good = sum(f.met_count for f in found)
    gpu_seconds = sum(f.gpu_seconds for f in found)
    return RunResult(
        model=model,
        slo_multiple=slo_multiple,
        policy=policy,
        trace=trace,
        arrivals=arrivals,
        physics=settings.physics.value,
        lend=settings.lend,
        seed=settings.seed,
        slo_ms=found[0].slo_s * 1e3 if len(found) == 1 else 0.0,
        requests=requests,
        completed=len(latencies),
        violations=violations,
        violation_rate=violations / requests if requests else 0.0,
        dropped=sum(f.refused_count + f.expired_count for f in found),
        p50_ms=_percentile(latencies, 0.50) * 1e3,
        p95_ms=_percentile(latencies, 0.95) * 1e3,
        p99_ms=_percentile(latencies, 0.99) * 1e3,
        gpu_seconds=gpu_seconds,
        actions=sum(sum(f.actions.values()) for f in found),
        gpus_peak=outcome.gpus_peak,
        decide_us_p50=_percentile(outcome.decide_s, 0.50) * 1e6,
        decide_us_p99=_percentile(outcome.decide_s, 0.99) * 1e6,
        cost_per_good=gpu_seconds / good if good else math.inf,
    )


def _bound(
    surface: Surface, slo_multiple: float, trace: Trace, arrivals: str, load: FunctionLoad, settings: Settings
) -> RunResult:
    times, table = load.arrivals_s, load.tables[0]
    if settings.lend:
        bound = borrowed_bound(times, table, max_batch=settings.max_batch)
    else:
        bound = reserved_bound(times, table, duration_s=trace.duration_s, max_batch=settings.max_batch)
    none = result_of(surface.model, slo_multiple, trace.name, arrivals, "clairvoyant", settings, _NOTHING)
    return replace(
        none,
        slo_ms=load.spec.slo_ms,
        requests=len(times),
        completed=len(times),
        gpu_seconds=bound.gpu_seconds,
        cost_per_good=bound.gpu_seconds / max(1, bound.requests_count),
    )


def peak_rps(times_s: Sequence[float]) -> float:
    """Returns the largest rate over any stretch of PEAK_WINDOW_S."""
    best = start = 0
    for end, at_s in enumerate(times_s):
        while times_s[start] < at_s - PEAK_WINDOW_S:
            start += 1
        best = max(best, end - start + 1)
    return best / PEAK_WINDOW_S


def geometric_mean(values: Sequence[float]) -> float:
    """Returns it; NaN of none."""
    return math.exp(sum(math.log(value) for value in values) / len(values)) if values else math.nan


def _percentile(ascending: Sequence[float], part: float) -> float:
    return ascending[max(1, math.ceil(part * len(ascending))) - 1] if len(ascending) else 0.0


_NOTHING = SimResult({}, (), (), RecordedLoad(()))
