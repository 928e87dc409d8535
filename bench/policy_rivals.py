"""Tuning of the rivals that `bench/policy.py` compares with: each of their constants moved both ways.

    python bench/policy.py --only rivals

On HAS-GPU's replay with Poisson arrivals, with idle time lent and with nothing lent. For each rival and setting: cost
in GPU-milliseconds per request answered inside its SLO (geometric mean over models and multiples) and the late or
dropped requests (mean). A rival is tuned when no setting beside its own is cheaper at no more violations. The careful
settings of the rivals, and those of `hybrid` that let more be late, are there to compare at equal violations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from hasgpu_core.policy.hasgpu import HasGpuPolicy
from hasgpu_core.policy.hybrid import HybridPolicy, HybridSettings
from hasgpu_core.policy.rivals import FastGSharePolicy, FastGShareSettings, KServePolicy
from hasgpu_core.policy.rivals.kserve import KServeSettings
from hasgpu_core.policy.scaling import ScalingPolicy, ScalingSettings
from hasgpu_sim.evaluate import Settings, function_load, geometric_mean, result_of, scenario_of
from hasgpu_sim.simulate import simulate
from hasgpu_sim.surface import Surface
from hasgpu_sim.traces import Trace


def settings_of(lend: bool) -> Iterator[tuple[str, str, ScalingPolicy]]:
    """(rival, setting, policy); the first of each rival is its own."""
    fast = FastGShareSettings(lend=lend)
    own, other_name = ("batches 1 to 8", "batch 1") if lend else ("batch 1", "batches 1 to 8")
    yield "fastgshare", f"as it is: fill 1, {own}, hold 10 s", FastGSharePolicy(fast)
    for fill in (0.1, 0.2, 0.3, 0.5, 0.7, 0.85):
        yield "fastgshare", f"fill {fill:g}", FastGSharePolicy(replace(fast, fill=fill))
    other = (1,) if lend else (1, 2, 4, 8)
    yield "fastgshare", other_name, FastGSharePolicy(replace(fast, batches=other))
    for hold_s in (4.0, 30.0):
        yield "fastgshare", f"hold {hold_s:g} s", FastGSharePolicy(replace(fast, hold_s=hold_s))
    yield "kserve", "as it is: target by the SLO, 70 %", KServePolicy()
    for target in (1.0, 2.0, 4.0, 8.0):
        yield "kserve", f"target {target:g}", KServePolicy(KServeSettings(target=target))
    for utilisation in (0.5, 0.9):
        yield "kserve", f"utilisation {utilisation:g}", KServePolicy(KServeSettings(utilisation=utilisation))
    plain = ScalingSettings()
    yield "hasgpu", "as it is: 0.9 of the capacity, margin 0.8", HasGpuPolicy(plain)
    for target in (0.7, 0.8, 1.0):
        yield "hasgpu", f"{target:g} of the capacity", HasGpuPolicy(replace(plain, target_utilisation=target))
    for margin in (0.6, 0.95):
        yield "hasgpu", f"margin {margin:g}", HasGpuPolicy(replace(plain, latency_margin=margin))
    yield "hasgpu", "hold 6 s", HasGpuPolicy(replace(plain, quota_hold_s=6.0))
    careful = replace(plain, target_utilisation=0.5, latency_margin=0.6)
    yield "hasgpu", "0.5 of the capacity, margin 0.6", HasGpuPolicy(careful)
    yield (
        "hasgpu",
        "0.3 of the capacity, margin 0.5",
        HasGpuPolicy(replace(plain, target_utilisation=0.3, latency_margin=0.5)),
    )
    for late_share in (0.0025, 0.02, 0.1, 0.3):
        ours = HybridSettings(lend=lend, late_share=late_share)
        yield "hybrid", f"plans for {late_share:.2%} late", HybridPolicy(ours)


def sweep(
    surfaces: Mapping[str, Surface], multiples: Sequence[float], trace: Trace, seed: int
) -> list[tuple[str, str, str, float, float]]:
    """Returns (time, rival, setting, GPU-milliseconds per request in time, late or dropped part)."""
    rows = []
    times = next(iter(trace.arrivals_s.values()))
    for lend in (True, False):
        settings = Settings(lend=lend, seed=seed)
        for rival, setting, policy in settings_of(lend):
            costs, rates = [], []
            for surface in surfaces.values():
                for multiple in multiples:
                    load = function_load("f", surface, multiple, times, settings)
                    outcome = simulate(scenario_of([load], surface, trace.duration_s, settings), policy)
                    run = result_of(surface.model, multiple, trace.name, "poisson", rival, settings, outcome)
                    costs.append(run.cost_per_good * 1e3)
                    rates.append(run.violation_rate)
            row = ("lent" if lend else "reserved", rival, setting, geometric_mean(costs), sum(rates) / len(rates))
            print(f"{row[0]:9} {rival:11} {setting:44} {row[3]:8.3f} mGPU-s, {row[4]:8.3%} late", flush=True)
            rows.append(row)
    return rows
