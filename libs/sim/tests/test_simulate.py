from __future__ import annotations

from dataclasses import replace

import pytest
from hasgpu_core.events import DemandEvent, DesiredInstance, DeviceEvent, FunctionEvent, InstanceEvent
from hasgpu_core.function import MIB
from hasgpu_core.policy.hasgpu import HasGpuPolicy
from hasgpu_core.policy.scaling import ActionKind, ScalingSettings
from hasgpu_core.resources import Allocation, DeviceInfo
from hasgpu_sim import FunctionLoad, Scenario, SimResult, Timing, simulate
from hasgpu_sim.arrivals import Process, RateStep, hasgpu_steps
from hasgpu_sim.recording import InstanceGone, RecordedInput, replay
from hasgpu_sim.synthetic import synthetic_spec, synthetic_table

CPU = DeviceInfo("n0", "cpu0", "cpu-2c", "cpu", 8192 * MIB, (25, 50, 75, 100))
SPEED = {25: 0.5, 50: 1.0, 75: 1.4, 100: 1.7}


def load(name: str, slo_ms: int, item_s: float, *steps: RateStep, **fields: int) -> FunctionLoad:
    table = synthetic_table(
        name, device_model="cpu-2c", slo_ms=slo_ms, fixed_s=item_s / 2, item_s=item_s / 2, speed=SPEED
    )
    return FunctionLoad(synthetic_spec(name, slo_ms=slo_ms, **fields), (table,), steps, Process.POISSON)


def demo(scale: float = 4.0, stage_s: float = 5.0) -> Scenario:
    """HAS-GPU's 50 rates on two functions that share a two-core device."""
    functions = (
        load("minilm", 300, 0.010, *hasgpu_steps(stage_s=stage_s, scale=scale)),
        load("resnet18", 500, 0.030, *hasgpu_steps(stage_s=stage_s, scale=scale / 2)),
    )
    return Scenario((CPU,), functions, 50 * stage_s, seed=7)


@pytest.fixture(scope="module")
def result() -> SimResult:
    return simulate(demo())


@pytest.mark.parametrize("utilisation", [0.3, 0.6, 0.8])
def test_waits_are_those_of_an_m_d_1_queue(utilisation: float) -> None:
    """Pollaczek-Khinchine: mean wait = rho L / (2 (1 - rho)); over 60,000 requests within 10 %."""
    latency_s = 0.01
    table = synthetic_table(
        "f", device_model="cpu-2c", slo_ms=1000, fixed_s=0.0, item_s=latency_s, speed={100: 1.0}, batches=(1,)
    )
    count = 60_000
    duration_s = count * latency_s / utilisation
    function = FunctionLoad(
        synthetic_spec("f", slo_ms=1000, max_batch=1),
        (table,),
        (RateStep(duration_s, utilisation / latency_s),),
        Process.POISSON,
        (DesiredInstance("f-0", Allocation(100, 1000, 1000, MIB)),),
        held=True,
    )
    slow = Timing(tick_s=duration_s, demand_period_s=duration_s, telemetry_period_s=duration_s)
    outcome = simulate(Scenario((replace(CPU, sm_rungs_pct=(100,)),), (function,), duration_s, 11, slow)).functions["f"]
    expected_s = utilisation * latency_s / (2 * (1 - utilisation))
    mean_s = sum(outcome.waits_s) / len(outcome.waits_s)
    assert mean_s == pytest.approx(expected_s, rel=0.10)
    assert outcome.unanswered_count < 20


def test_hasgpus_workload_shows_every_kind_of_action_and_keeps_the_slo(result: SimResult) -> None:
    totals = {kind: sum(f.actions[kind] for f in result.functions.values()) for kind in ActionKind}
    assert all(totals[kind] >= 1 for kind in ActionKind), totals
    for function in result.functions.values():
        assert function.requests_count > 1000
        assert function.attainment >= 0.95
        assert function.refused_count == function.expired_count == 0


def test_quotas_come_down_again(result: SimResult) -> None:
    by_time: dict[float, int] = {}
    for sample in result.shares:
        if sample.function == "minilm":
            by_time[sample.at_s] = by_time.get(sample.at_s, 0) + sample.sm_pct * sample.request_permille
    peak = max(by_time.values())
    after_peak = [cost for at_s, cost in by_time.items() if at_s > 75]
    assert min(after_peak) <= peak / 2
    whole = 250 * 0.75
    assert result.functions["minilm"].gpu_seconds < 0.5 * whole


def test_rows_are_never_over_filled(result: SimResult) -> None:
    for entry in result.recording.entries:
        if isinstance(entry, RecordedInput) and isinstance(entry.event, DeviceEvent):
            assert all(row.used_permille <= 1000 for row in entry.event.rows)
            assert sum(row.sm_pct for row in entry.event.rows) <= 100


def test_equal_scenarios_give_equal_results(result: SimResult) -> None:
    assert simulate(demo()) == result
    assert simulate(replace(demo(), seed=8)).decisions != result.decisions


def test_a_recording_replays_to_the_same_decisions(result: SimResult) -> None:
    recording = result.recording
    assert replay(recording, HasGpuPolicy(ScalingSettings())) == tuple(recording.ticks)
    types = {type(entry.event) for entry in recording.entries if isinstance(entry, RecordedInput)}
    assert {FunctionEvent, DemandEvent, InstanceEvent, InstanceGone, DeviceEvent} <= types
    assert [e.at_s for e in recording.entries] == sorted(e.at_s for e in recording.entries)
    assert sum(bool(d.actions) for tick in recording.ticks for d in tick.decisions) == len(result.decisions)
    other = HasGpuPolicy(ScalingSettings(target_utilisation=0.5))
    assert replay(recording, other) != tuple(recording.ticks)


def test_a_step_is_answered_within_two_seconds() -> None:
    """HAS-GPU's released loop first changes a quota 5 to 7 s after a step, and settles after 7 to 52 s."""
    steps = (RateStep(30, 10), RateStep(30, 30))
    even = replace(load("f", 300, 0.010, *steps), process=Process.EVEN)
    outcome = simulate(Scenario((CPU,), (even,), 60))
    after = [at_s for at_s, decision in outcome.decisions if at_s > 30]
    assert after[0] <= 32
    settled = [at_s for at_s, d in outcome.decisions if at_s > 36 and d.actions[0].kind is ActionKind.VERTICAL_UP]
    assert settled == []


def test_to_zero_and_back_loses_no_request() -> None:
    steps = (RateStep(10, 5), RateStep(60, 0), RateStep(20, 5))
    function = load("f", 300, 0.010, *steps, min_instances=0)
    outcome = simulate(Scenario((CPU,), (function,), 95, seed=3))
    reasons = [decision.reason for _, decision in outcome.decisions]
    assert any("scaled to zero" in reason for reason in reasons)
    found = outcome.functions["f"]
    assert found.expired_count == found.refused_count == found.unanswered_count == 0
    assert len(found.latencies_s) == found.requests_count
    assert found.actions[ActionKind.HORIZONTAL_UP] >= 2


def test_overload_is_refused_early_and_what_is_taken_is_answered() -> None:
    function = load("f", 300, 0.100, RateStep(40, 200), timeout_ms=1000, max_instances=1)
    outcome = simulate(Scenario((CPU,), (function,), 45, seed=3)).functions["f"]
    assert outcome.refused_count > 1000
    answered = len(outcome.latencies_s) + outcome.refused_count + outcome.expired_count + outcome.unanswered_count
    assert answered == outcome.requests_count
    assert outcome.percentile_s(50) is not None


def test_requests_of_several_rows_are_that_much_more_demand() -> None:
    steps = (RateStep(120, 12.0),)
    table = load("f", 500, 0.010).tables[0]
    four = FunctionLoad(synthetic_spec("f", slo_ms=500), (table,), steps, rows=4)
    one = replace(four, steps=(RateStep(120, 48.0),), rows=1)
    by_rows = [simulate(Scenario((CPU,), (function,), 120.0)) for function in (four, one)]
    last = [list(outcome.recording.ticks)[-1].decisions[0] for outcome in by_rows]
    assert last[0].observed_rps == pytest.approx(48.0, rel=0.15)
    assert last[0].needed_rps == pytest.approx(last[1].needed_rps, rel=0.15)
    assert last[0].capacity_rps >= 48.0
    assert by_rows[0].functions["f"].attainment >= 0.9
