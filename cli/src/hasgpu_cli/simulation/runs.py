"""The runs of a simulation: each policy over each load, with figures and lines over time."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hasgpu_core.errors import InvalidError
from hasgpu_core.function import MIB
from hasgpu_core.policy.rivals.clairvoyant import borrowed_bound, reserved_bound
from hasgpu_core.policy.scaling import Decision, PolicyState, ScalingPolicy
from hasgpu_sim.evaluate import LEAD_S, RunResult, Settings, make_policy, peak_rps, result_of, scenario_of
from hasgpu_sim.recording import RecordedLoad
from hasgpu_sim.scenario import FunctionLoad, Scenario, SimResult
from hasgpu_sim.simulate import simulate
from hasgpu_sim.surface import Surface

BINS_COUNT = 250
SPARSE_ABOVE = 8
"""With more functions than these a function is looked at when there is something to do, not at each tick."""
RESTING = "between two looks"
"""Of a policy with a slower tick of its own; such a decision tells no capacity."""
Line = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Case:
    """A load to be run under each policy."""

    title: str
    loads: tuple[FunctionLoad, ...]
    models: Mapping[str, str]
    """Of each function."""
    multiples: Mapping[str, float]
    """SLO over the reference latency, of each function."""
    surface: Surface
    """Tells the devices' model and shares."""
    duration_s: float
    trace: str
    arrivals: str
    per_function: bool
    """Figures for each function too, not for all together alone."""

    @property
    def sparse(self) -> bool:
        """Whether there are many functions."""
        return len(self.loads) > SPARSE_ABOVE

    @property
    def model(self) -> str:
        """Of all its functions."""
        return "+".join(sorted(set(self.models.values())))

    @property
    def multiple(self) -> float:
        """Of all its functions, 0 where they have several."""
        found = set(self.multiples.values())
        return found.pop() if len(found) == 1 else 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run."""

    case: Case
    policy: str
    results: tuple[Mapping[str, Any], ...]
    """As in the JSON; the first is for all functions together, the others for single ones."""
    lines: Mapping[str, Line] = field(default_factory=dict)
    """`rate`, `capacity`, `share`, `violations` over time; none for a bound."""
    took_s: float = 0.0


class Watched:
    """A policy that tells how far the simulation is, and keeps what capacity it reckons with, once every `bin_s`."""

    def __init__(self, policy: ScalingPolicy, tell: Callable[[float], None], bin_s: float) -> None:
        self._policy = policy
        self._tell = tell
        self._bin_s = bin_s
        self._newest: dict[str, float] = {}
        self.capacities: list[tuple[float, float]] = []
        """(seconds from the first arrival on, of all functions)"""

    @property
    def name(self) -> str:
        """The policy's."""
        return self._policy.name

    def decide(self, snapshot: Any, state: PolicyState, now_s: float) -> tuple[tuple[Decision, ...], PolicyState]:
        """The policy's decisions."""
        at_s = now_s - LEAD_S
        self._tell(at_s)
        decisions, state = self._policy.decide(snapshot, state, now_s)
        for decision in decisions:
            if not decision.reason.startswith(RESTING):
                self._newest[decision.function] = decision.capacity_rps
        if at_s >= 0 and (not self.capacities or at_s - self.capacities[-1][0] >= self._bin_s):
            self.capacities.append((at_s, sum(self._newest.values())))
        return decisions, state


def check_memory(case: Case, settings: Settings) -> None:
    """Raises InvalidError when the instances that must always run can't fit into the GPUs' memory together."""
    sizes = sorted(
        (load.spec.memory_bytes for load in case.loads for _ in range(load.spec.min_instances)), reverse=True
    )
    free = [settings.gpu_memory_mib * MIB] * settings.gpus
    for size in sizes:
        fitting = [index for index, room in enumerate(free) if room >= size]
        if not fitting:
            raise InvalidError(
                f"memory of {len(case.loads)} functions",
                expected=f"{settings.gpus} GPUs of {settings.gpu_memory_mib} MiB to hold the instances that must run",
                got=f"{sum(sizes) >> 20} MiB in {len(sizes)} instances of up to {sizes[0] >> 20} MiB",
            )
        free[min(fitting, key=lambda index: free[index])] -= size


def run_case(
    case: Case, policy: str, settings: Settings, tell: Callable[[float], None], *, keep: bool
) -> tuple[Outcome, RecordedLoad | None]:
    """Runs one policy over a load.

    Args:
        case: The load.
        policy: Its name, or "clairvoyant": a bound, nothing is simulated.
        settings: What all runs have in common.
        tell: Called with the virtual time reached (seconds from the first arrival on, negative before).
        keep: Keep lines over time.
    """
    began_s = time.perf_counter()
    if policy == "clairvoyant":
        results = _bounds(case, settings)
        return Outcome(case, policy, results, {}, time.perf_counter() - began_s), None
    scenario = _scenario(case, settings, keep=keep)
    peaks = {load.spec.name: peak_rps(load.arrivals_s) for load in case.loads}
    watched = Watched(make_policy(policy, settings, peaks), tell, case.duration_s / BINS_COUNT)
    outcome = simulate(scenario, watched, stopwatch=time.perf_counter)
    results = _results(case, policy, settings, outcome)
    lines = lines_of(case, outcome, watched.capacities) if keep else {}
    return Outcome(case, policy, results, lines, time.perf_counter() - began_s), outcome.recording


def _scenario(case: Case, settings: Settings, *, keep: bool) -> Scenario:
    scenario = scenario_of(case.loads, case.surface, case.duration_s, settings, sparse=case.sparse)
    sample_s = max(case.duration_s / BINS_COUNT, settings.tick_s) if keep else 0.0
    return replace(scenario, sample_s=sample_s)


def _results(case: Case, policy: str, settings: Settings, outcome: SimResult) -> tuple[Mapping[str, Any], ...]:
    whole = result_of(case.model, case.multiple, case.trace, case.arrivals, policy, settings, outcome)
    out = [_plain(replace(whole, slo_ms=_slo_ms(case)), "", len(case.loads))]
    if case.per_function:
        for load in case.loads:
            name = load.spec.name
            alone = replace(outcome, functions={name: outcome.functions[name]})
            found = result_of(
                case.models[name], case.multiples[name], case.trace, case.arrivals, policy, settings, alone
            )
            out.append(_plain(found, name, 1))
    return tuple(out)


def _slo_ms(case: Case) -> float:
    """Of all functions; 0 where they differ."""
    found = {load.spec.slo_ms for load in case.loads}
    return float(found.pop()) if len(found) == 1 else 0.0


def _bounds(case: Case, settings: Settings) -> tuple[Mapping[str, Any], ...]:
    """What a policy that knows the future can't cost less than, for each function by itself."""
    nothing = SimResult({}, (), (), RecordedLoad(()))
    out: list[Mapping[str, Any]] = []
    total_seconds, total_count, total_good = 0.0, 0, 0
    for load in case.loads:
        name, table, times = load.spec.name, load.tables[0], load.arrivals_s
        if settings.lend:
            bound = borrowed_bound(times, table, max_batch=load.spec.max_batch)
        else:
            bound = reserved_bound(times, table, duration_s=case.duration_s, max_batch=load.spec.max_batch)
        total_seconds += bound.gpu_seconds
        total_count += len(times)
        total_good += bound.requests_count
        found = result_of(
            case.models[name], case.multiples[name], case.trace, case.arrivals, "clairvoyant", settings, nothing
        )
        found = _bounded(found, load.spec.slo_ms, len(times), bound.gpu_seconds, bound.requests_count)
        out.append(_plain(found, name, 1))
    whole = result_of(case.model, case.multiple, case.trace, case.arrivals, "clairvoyant", settings, nothing)
    first = _plain(_bounded(whole, _slo_ms(case), total_count, total_seconds, total_good), "", len(case.loads))
    return (first, *(out if case.per_function else ()))


def _bounded(found: RunResult, slo_ms: float, count: int, gpu_seconds: float, good: int) -> RunResult:
    return replace(
        found,
        slo_ms=slo_ms,
        requests=count,
        completed=count,
        gpu_seconds=gpu_seconds,
        cost_per_good=gpu_seconds / good if good else math.inf,
    )


def _plain(found: RunResult, function: str, functions_count: int) -> Mapping[str, Any]:
    """As in the JSON, which knows no infinity."""
    out = found.as_dict()
    if not math.isfinite(found.cost_per_good):
        out["cost_per_good"] = None
    return {**out, "function": function, "functions": functions_count}


# Over time


def lines_of(case: Case, outcome: SimResult, capacities: Line) -> dict[str, Line]:
    """Returns what the page shows over time, all functions together."""
    bin_s = case.duration_s / BINS_COUNT
    late = sorted(at_s for found in outcome.functions.values() for at_s in found.violated_s)
    return {
        "rate": rate_line(case, bin_s),
        "capacity": [*capacities, (case.duration_s, capacities[-1][1])] if capacities else [],
        "share": _shares(outcome),
        "violations": [(at_s, float(bisect_left(late, at_s))) for at_s in _edges(case.duration_s, bin_s)],
    }


def rate_line(case: Case, bin_s: float) -> Line:
    """Requests a second of all functions, bin by bin."""
    counts = [0] * (BINS_COUNT + 1)
    for load in case.loads:
        for at_s in load.arrivals_s:
            counts[min(BINS_COUNT, int(at_s / bin_s))] += 1
    return [(index * bin_s, count / bin_s) for index, count in enumerate(counts[:BINS_COUNT])]


def _edges(duration_s: float, bin_s: float) -> Iterator[float]:
    for index in range(BINS_COUNT + 1):
        yield min(duration_s, index * bin_s)


def _shares(outcome: SimResult) -> Line:
    """GPUs requested, summed over instances."""
    totals: dict[float, float] = {}
    for sample in outcome.shares:
        share = sample.sm_pct * sample.request_permille / 1e5
        totals[sample.at_s] = totals.get(sample.at_s, 0.0) + share
    return sorted(totals.items())
