"""Every policy through the simulator: deterministic, replayed equally, and against faults that peers had."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hasgpu_core.errors import InvalidError, NotFoundError
from hasgpu_core.policy.scaling import ActionKind
from hasgpu_sim import SimResult, simulate
from hasgpu_sim.arrivals import Process, RateStep, arrival_times_s, hasgpu_steps
from hasgpu_sim.evaluate import (
    LEAD_S,
    POLICIES,
    Settings,
    function_load,
    make_policy,
    peak_rps,
    run_one,
    scenario_of,
    slo_ms_of,
)
from hasgpu_sim.recording import RecordedTick, replay
from hasgpu_sim.scenario import NodeLoss
from hasgpu_sim.surface import filled_surface
from hasgpu_sim.traces import Trace

SIMULATED = [policy for policy in POLICIES if policy != "clairvoyant"]
SURFACE = filled_surface(
    "made-up",
    "emu",
    {
        (batch, sm_pct, quota): (0.004 + 0.016 * (0.6 + 0.4 * batch) * 30 / (30 + sm_pct)) * 1000 / quota
        for batch in (1, 2, 4, 8)
        for sm_pct in range(10, 101, 10)
        for quota in range(100, 1001, 100)
        if (batch, sm_pct, quota) not in {(1, 50, 500), (8, 100, 100)}
    },
)


def trace(*steps: RateStep, process: Process = Process.POISSON, seed: int = 5) -> Trace:
    duration_s = sum(step.duration_s for step in steps)
    return Trace("made-up", duration_s, {"f": arrival_times_s(steps, process, Random(seed))})


def run(policy: str, load: Trace, settings: Settings | None = None, multiple: float = 4.0) -> SimResult:
    outcome = run_one(SURFACE, multiple, load, "poisson", policy, settings or Settings(gpus=2))[1]
    assert outcome is not None
    return outcome


@pytest.mark.parametrize("policy", SIMULATED)
def test_a_run_repeats_and_its_recording_replays_to_the_same_decisions(policy: str) -> None:
    load = trace(*hasgpu_steps(stage_s=1.0, scale=2.0))
    first, again = run(policy, load), run(policy, load)
    assert first == again
    fresh = make_policy(policy, Settings(gpus=2), {"f": peak_rps(load.arrivals_s["f"])})
    assert replay(first.recording, fresh) == tuple(first.recording.ticks)
    found = first.functions["f"]
    assert found.requests_count == load.requests_count
    assert len(found.latencies_s) + found.refused_count + found.expired_count + found.unanswered_count == (
        load.requests_count
    )


@pytest.mark.parametrize("lend", [True, False])
def test_hybrid_meets_the_objective_cheaper_than_whole_gpus(lend: bool) -> None:
    load = trace(*hasgpu_steps(), seed=9)
    ours, _ = run_one(SURFACE, 3.0, load, "poisson", "hybrid", Settings(gpus=2, lend=lend))
    kserve, _ = run_one(SURFACE, 3.0, load, "poisson", "kserve", Settings(gpus=2, lend=lend))
    bound, _ = run_one(SURFACE, 3.0, load, "poisson", "clairvoyant", Settings(gpus=2, lend=lend))
    assert ours.violation_rate <= 0.005
    assert ours.cost_per_good < kserve.cost_per_good / 3
    assert bound.cost_per_good <= ours.cost_per_good


def test_hybrid_does_nothing_under_a_constant_load() -> None:
    outcome = run("hybrid", trace(RateStep(900, 10.0)))
    after = [decision for at_s, decision in outcome.decisions if at_s > 300]
    assert len(after) <= 2


def test_hybrid_keeps_shares_while_no_data_comes() -> None:
    """No data is no reason to change anything: the recording without demand asks for the floor alone."""
    outcome = run("hybrid", trace(RateStep(30, 10.0)))
    entries = tuple(
        e for e in outcome.recording.entries if isinstance(e, RecordedTick) or type(e.event).__name__ != "DemandEvent"
    )
    load = replace(outcome.recording, entries=entries)
    ticks = replay(load, make_policy("hybrid", Settings(gpus=2)))
    late = [action for tick in ticks[200:] for d in tick.decisions for action in d.actions]
    assert not [a for a in late if a.kind is ActionKind.HORIZONTAL_DOWN]


def test_hybrid_comes_back_from_silence_without_jumping() -> None:
    """Zero traffic is no NaN, and the first requests after it don't ask for the maximum."""
    outcome = run("hybrid", trace(RateStep(30, 10.0), RateStep(120, 0.0), RateStep(30, 10.0)))
    assert outcome.functions["f"].violations_count <= 3
    assert max(len(d.desired) for _, d in outcome.decisions) <= 8


def test_hybrid_holds_the_first_request_after_zero() -> None:
    settings = Settings(gpus=2, min_instances=0, timeout_slos=400)
    outcome = run("hybrid", trace(RateStep(10, 5.0), RateStep(120, 0.0), RateStep(20, 5.0)), settings)
    found = outcome.functions["f"]
    assert any("scaled to zero" in decision.reason for _, decision in outcome.decisions)
    assert found.refused_count == found.expired_count == 0


def test_the_survivors_take_over_when_a_node_is_lost() -> None:
    """Lost instances are no routes any more, are bound elsewhere, and what they held is tried again."""
    load = trace(RateStep(120, 12.0))
    settings = Settings(gpus=4, gpus_per_node=1, losses=(NodeLoss("n000", 40.0),))
    outcome = run("hybrid", load, settings)
    found = outcome.functions["f"]
    assert found.unanswered_count <= 2
    bound = {sample.at_s for sample in outcome.shares if sample.ready and sample.at_s > 60}
    assert len(bound) >= 50
    assert len([t for t in found.latencies_s if t <= found.slo_s]) >= 0.8 * found.requests_count


def test_hybrid_shrinks_again_after_a_burst() -> None:
    settings = Settings(gpus=2, lend=False)
    outcome = run("hybrid", trace(RateStep(60, 5.0), RateStep(30, 60.0), RateStep(240, 5.0)), settings)
    cost: dict[float, float] = {}
    for sample in outcome.shares:
        cost[sample.at_s] = cost.get(sample.at_s, 0.0) + sample.sm_pct * sample.request_permille / 1e5
    peak = max(value for at_s, value in cost.items() if 60 < at_s < 120)
    assert cost[max(cost)] < 0.85 * peak


def test_clear_errors() -> None:
    with pytest.raises(InvalidError, match=r"gpus: .*at least 1.*got.*0"):
        Settings(gpus=0)
    with pytest.raises(InvalidError, match="the fastest possible takes"):
        function_load("f", SURFACE, 0.1, (1.0,), Settings())
    with pytest.raises(InvalidError, match="MiB"):
        function_load("f", SURFACE, 3.0, (1.0,), Settings(gpu_memory_mib=1000, instance_memory_mib=2000))
    with pytest.raises(NotFoundError, match="hybrid"):
        make_policy("nobody", Settings())


def test_many_functions_sparsely_give_about_what_they_give_densely() -> None:
    settings = Settings(gpus=4, tick_s=0.25)
    times = {f"f-{i}": arrival_times_s([RateStep(300, 0.2 + i)], Process.POISSON, Random(i)) for i in range(4)}
    loads = [function_load(name, SURFACE, 4.0, arrivals, settings) for name, arrivals in times.items()]
    outcomes = [
        simulate(scenario_of(loads, SURFACE, 300.0, settings, sparse=sparse), make_policy("hybrid", settings))
        for sparse in (False, True)
    ]
    costs = [sum(f.gpu_seconds for f in outcome.functions.values()) for outcome in outcomes]
    assert costs[1] == pytest.approx(costs[0], rel=0.15)
    for outcome in outcomes:
        requests = sum(f.requests_count for f in outcome.functions.values())
        assert sum(f.violations_count for f in outcome.functions.values()) <= 0.01 * requests
    assert not outcomes[1].recording.entries


def test_cost_and_actions_count_from_the_first_arrival_on() -> None:
    outcome = run("static-peak", trace(RateStep(50, 5.0)))
    samples = [s for s in outcome.shares if s.at_s == outcome.shares[0].at_s]
    share = sum(s.sm_pct * s.request_permille / 1e5 for s in samples)
    assert outcome.functions["f"].gpu_seconds == pytest.approx(50 * share, rel=1e-6)
    assert sum(outcome.functions["f"].actions.values()) == 0
    assert next(at_s for at_s, _ in outcome.decisions) == pytest.approx(-LEAD_S)
    assert slo_ms_of(SURFACE, 2.0) == -(-2 * SURFACE.reference_s * 1e3 // 1)
