"""The faults that peers' autoscalers shipped, one test each, on `hybrid` in the simulator (seconds of load each)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from random import Random

from hasgpu_core.capacity import CapacityTable
from hasgpu_core.events import DemandEvent, InstanceEvent
from hasgpu_core.policy.hybrid import HybridPolicy, HybridSettings
from hasgpu_core.policy.scaling import ActionKind, Decision
from hasgpu_core.resources import InstanceState
from hasgpu_sim import SimResult, simulate
from hasgpu_sim.arrivals import Process, RateStep, arrival_times_s
from hasgpu_sim.evaluate import LEAD_S, Settings, function_load, scenario_of
from hasgpu_sim.recording import Loop, RecordedInput, RecordedTick, apply
from hasgpu_sim.scenario import NodeLoss
from hasgpu_sim.surface import filled_surface

SURFACE = filled_surface(
    "made-up",
    "emu",
    {
        (batch, sm_pct, quota): (0.004 + 0.016 * (0.6 + 0.4 * batch) * 30 / (30 + sm_pct)) * 1000 / quota
        for batch in (1, 2, 4, 8)
        for sm_pct in range(10, 101, 10)
        for quota in range(100, 1001, 100)
    },
)
RESERVED = Settings(gpus=2, lend=False, tick_s=0.25)
LENT = replace(RESERVED, lend=True)


def run(
    *steps: RateStep, settings: Settings = RESERVED, process: Process = Process.POISSON, seed: int = 3
) -> SimResult:
    duration_s = sum(step.duration_s for step in steps)
    load = function_load("f", SURFACE, 4.0, arrival_times_s(steps, process, Random(seed)), settings)
    policy = HybridPolicy(HybridSettings(lend=settings.lend))
    return simulate(scenario_of([load], SURFACE, duration_s, settings), policy)


def replayed(
    outcome: SimResult, change: Callable[[float, object], object | None], lend: bool = False
) -> list[Decision]:
    """Feeds a recording through `hybrid` again, with its inputs changed, or left out (None)."""
    loop = Loop(HybridPolicy(HybridSettings(lend=lend)))
    decisions = []
    for entry in outcome.recording.entries:
        if isinstance(entry, RecordedTick):
            decisions += loop.tick(entry.at_s)
        elif (event := change(entry.at_s, entry.event)) is not None:
            apply(loop.observer, event, entry.at_s)  # type: ignore[arg-type]  # an event of the recording
    return decisions


def active_count(decision: Decision) -> int:
    return sum(not desired.standby for desired in decision.desired)


def test_scale_down_leaves_what_the_survivors_can_take() -> None:
    """Dynamo #9294: N - 1 instances have to absorb N / (N - 1) of what each had."""
    outcome = run(RateStep(20, 150.0), RateStep(120, 20.0))
    shrunk = [d for t, d in outcome.decisions if t > 20 and any("DOWN" in a.kind.name for a in d.actions)]
    assert shrunk
    reports = [e.event for e in outcome.recording.entries if isinstance(e, RecordedInput) and e.at_s > LEAD_S + 40]
    first, *_, last = [event for event in reports if isinstance(event, DemandEvent)]
    bad = [event.late_count + event.refused_count + event.failed_count for event in (first, last)]
    assert last.arrived_count - first.arrived_count > 1500
    assert bad[1] - bad[0] <= 0.005 * (last.arrived_count - first.arrived_count)


def test_zero_traffic_is_no_nan_and_freezes_nothing() -> None:
    """Dynamo #6985: a percentile of nothing is no number, and decisions stopped until a restart."""
    outcome = run(RateStep(10, 10.0), RateStep(30, 0.0), RateStep(20, 30.0))
    ticks = [d for tick in outcome.recording.ticks for d in tick.decisions]
    assert all(math.isfinite(d.capacity_rps) and "nan" not in d.reason for d in ticks)
    assert any(t > 40 for t, _ in outcome.decisions)  # it acts again when load comes
    found = outcome.functions["f"]
    assert found.violations_count <= 0.02 * found.requests_count


def test_a_metrics_outage_leaves_no_function_below_its_floor() -> None:
    """Dynamo #14575: without metrics replicas went below the minimum. Here instances that died are still replaced."""
    outcome = run(RateStep(30, 10.0), settings=replace(RESERVED, min_instances=2))

    def silent(at_s: float, event: object) -> object | None:
        return None if isinstance(event, DemandEvent) and at_s > LEAD_S + 10 else event

    after = replayed(outcome, silent)[-20:]
    assert after[-1].observed_rps is None
    assert all(len(d.desired) >= 2 for d in after)


def test_a_metrics_outage_changes_no_share() -> None:
    """No data is not zero."""
    outcome = run(RateStep(40, 10.0))

    def silent(at_s: float, event: object) -> object | None:
        return None if isinstance(event, DemandEvent) and at_s > LEAD_S + 15 else event

    loud = replayed(outcome, lambda _, event: event)
    quiet = replayed(outcome, silent)
    begun = next(i for i, d in enumerate(quiet) if d.observed_rps is None and i > 100)
    assert quiet[-1].desired == quiet[begun].desired
    assert loud[-1].observed_rps is not None


def test_waits_are_longer_than_what_they_look_back_on() -> None:
    """Ray #26455: a delay shorter than the look-back window acts twice on the same metric."""
    settings = HybridSettings()
    assert settings.settle_s > settings.rate_window_s
    assert settings.lookback_s > settings.settle_s
    outcome = run(RateStep(60, 30.0), RateStep(120, 10.0))
    down = [t for t, d in outcome.decisions if t > 60 and any(a.kind is ActionKind.VERTICAL_DOWN for a in d.actions)]
    times = [t for i, t in enumerate(down) if i == 0 or t - down[i - 1] > 1.0]
    assert all(b - a >= settings.rate_window_s for a, b in pairwise(times))


def test_from_zero_it_starts_what_is_needed_and_not_the_maximum() -> None:
    """Ray #61731: the gain was applied at zero replicas and jumped to the maximum."""
    settings = replace(RESERVED, min_instances=0, max_instances=16, timeout_slos=200)
    outcome = run(RateStep(5, 5.0), RateStep(80, 0.0), RateStep(20, 5.0), settings=settings)
    assert any(not d.desired for _, d in outcome.decisions)
    assert max(active_count(d) for t, d in outcome.decisions if t > 85) <= 4


def test_a_rate_on_a_boundary_does_not_jitter() -> None:
    """Ray #64468: rounding flips between two counts. The load is put at what the plan sustains, to the last digit."""
    first = run(RateStep(60, 12.0))
    edge_rps = list(first.recording.ticks)[-1].decisions[0].capacity_rps
    outcome = run(RateStep(300, edge_rps), seed=4)
    assert sum(len(d.actions) for t, d in outcome.decisions if t > 150) <= 6


def test_after_a_burst_it_does_not_drop_at_once() -> None:
    """Knative #3153: leaving panic mode, the count fell to the stable window's at a stroke under load."""
    outcome = run(RateStep(30, 10.0), RateStep(20, 60.0), RateStep(70, 45.0))
    found = outcome.functions["f"]
    ticks = [(tick.at_s - LEAD_S, tick.decisions[0]) for tick in outcome.recording.ticks]
    least = min(d.capacity_rps for t, d in ticks if 60 < t < 118)
    assert least >= 40.0
    assert found.violations_count <= 0.03 * found.requests_count


def test_one_writer_decides_a_number() -> None:
    """KEDA #5288: two controllers wrote one replica count in turns. What is held by hand is left to the hand."""
    times = arrival_times_s([RateStep(20, 80.0)], Process.POISSON, Random(1))
    load = replace(function_load("f", SURFACE, 4.0, times, RESERVED), held=True)
    held = simulate(scenario_of([load], SURFACE, 20.0, RESERVED), HybridPolicy(HybridSettings(lend=False)))
    assert held.decisions == ()
    assert "held by hand" in list(held.recording.ticks)[-1].decisions[0].reason


def test_the_first_request_after_zero_is_answered() -> None:
    """KServe #2882: it failed."""
    settings = replace(RESERVED, min_instances=0, timeout_slos=400)
    outcome = run(RateStep(5, 5.0), RateStep(90, 0.0), RateStep(10, 5.0), settings=settings)
    found = outcome.functions["f"]
    assert any("scaled to zero" in decision.reason for _, decision in outcome.decisions)
    assert found.refused_count == found.expired_count == 0


def test_predictions_are_data_and_are_read_once() -> None:
    """GIE #1937: the predictor was asked for each candidate of each decision. Here a table is read once a function."""
    asked = 0

    class Counted(CapacityTable):
        def latency_s(self, batch: int, sm_pct: int, quota_permille: int) -> float | None:
            nonlocal asked
            asked += 1
            return super().latency_s(batch, sm_pct, quota_permille)

    table = SURFACE.table("f", round(4 * SURFACE.reference_s * 1e3))
    counted = Counted("f", 1, table.device_model, 1, 0, table.slo_ms, table.points)
    outcome = run(RateStep(20, 20.0))
    loop = Loop(HybridPolicy(HybridSettings(lend=False)))
    asked_at: list[int] = []
    for entry in outcome.recording.entries:
        if isinstance(entry, RecordedInput):
            event = counted if isinstance(entry.event, CapacityTable) else entry.event
            apply(loop.observer, event, entry.at_s)
        else:
            loop.tick(entry.at_s)
            asked_at.append(asked)
    assert asked_at[-1] == asked_at[len(asked_at) // 2] > 0
    assert asked_at[-1] <= len(SURFACE.sm_pcts) * len(SURFACE.quotas_permille) * 8


def test_dead_instances_are_no_capacity() -> None:
    """Ray #63279: dead replicas stayed routable, the controller counted them and swung between 500 and 2000."""
    settings = replace(LENT, gpus=4, gpus_per_node=1, losses=(NodeLoss("n000", 20.0),))
    outcome = run(RateStep(60, 12.0), settings=settings)
    found = outcome.functions["f"]
    assert found.unanswered_count <= 2
    gone = [tick.decisions[0] for tick in outcome.recording.ticks if 25.5 < tick.at_s - LEAD_S < 26.5]
    assert any(d.capacity_rps == 0.0 for d in gone) or found.violations_count == 0
    assert max(len(d.desired) for _, d in outcome.decisions) <= 4
    assert len([t for t in found.latencies_s if t <= found.slo_s]) >= 0.75 * found.requests_count


def test_failed_instances_are_replaced_one_for_one() -> None:
    """The same fault, with workers that die: each failure asks for one instance, not for more."""
    outcome = run(RateStep(40, 12.0))

    def failing(at_s: float, event: object) -> object | None:
        if isinstance(event, InstanceEvent) and at_s > LEAD_S + 10:
            return replace(event, state=InstanceState.FAILED)
        return event

    decisions = replayed(outcome, failing)
    assert max(len(d.desired) for d in decisions) <= max(len(d.desired) for _, d in outcome.decisions) + 1
