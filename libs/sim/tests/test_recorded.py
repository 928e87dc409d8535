"""A recording as a load, and what it keeps of itself in a file."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hasgpu_core.errors import InvalidError
from hasgpu_core.policy.choice import make_live_policy
from hasgpu_core.policy.scaling import ActionKind
from hasgpu_core.recording import RecordedInput, RecordedLoad, RecordedTick, lines_of, parse
from hasgpu_sim.arrivals import Process, RateStep
from hasgpu_sim.recorded import scenario_of_recording
from hasgpu_sim.scenario import FunctionLoad, Scenario, SimResult, Timing
from hasgpu_sim.simulate import simulate
from hasgpu_sim.synthetic import synthetic_spec, synthetic_table

SPEED = {25: 0.4, 50: 0.7, 100: 1.0}


def devices(model: str = "emu") -> tuple[object, ...]:
    from hasgpu_core.resources import DeviceInfo

    return (DeviceInfo("n0", "gpu0", model, "emulated", 1 << 34, (25, 50, 100)),)


@pytest.fixture(scope="module")
def outcome() -> SimResult:
    table = synthetic_table("f", device_model="emu", slo_ms=150, fixed_s=0.01, item_s=0.005, speed=SPEED)
    load = FunctionLoad(synthetic_spec("f", slo_ms=150), (table,), (RateStep(20, 5.0), RateStep(20, 60.0)))
    return simulate(
        Scenario(devices(), (load,), 40.0, timing=Timing(cold_start_s=3.0)),  # type: ignore[arg-type]
        make_live_policy("hasgpu"),
    )


def test_a_file_gives_back_what_was_written(outcome: SimResult) -> None:
    load = replace(outcome.recording, unix_offset_ns=7)
    assert parse(list(lines_of(load, "hasgpu"))) == load


def test_later_segments_begin_with_what_is_known_already(outcome: SimResult) -> None:
    lines = list(lines_of(outcome.recording))
    inputs = [line for line in lines[1:12] if '"k":"tick"' not in line]
    again = [lines[0].replace('"fresh": true', '"fresh": false'), *(line[:-1] + ',"base":1}' for line in inputs)]
    assert parse([*lines, *again]).entries == outcome.recording.entries
    # A process that began anew knows what its predecessor missed; what was desired stays as it was decided.
    fresh = parse([*lines, lines[0], *again[1:]]).entries
    added = fresh[len(outcome.recording.entries) :]
    assert added
    assert all(isinstance(e, RecordedInput) and type(e.event).__name__ != "InitialDesired" for e in added)


def test_the_load_is_what_the_gateways_counted(outcome: SimResult) -> None:
    found = scenario_of_recording(outcome.recording, Process.EVEN)
    (function,) = found.functions
    told = outcome.functions["f"]
    assert abs(function.requests - told.requests_count) <= 60 * 0.25 + 1  # since the last report
    assert len(function.arrivals_s) == function.requests
    assert list(function.arrivals_s) == sorted(function.arrivals_s)
    early = sum(1 for at_s in function.arrivals_s if at_s < 20)
    assert early == pytest.approx(100, abs=3)
    assert function.gpu_seconds == pytest.approx(told.gpu_seconds, rel=0.03)
    assert function.actions == sum(told.actions.values())
    assert function.late + function.refused + function.failed <= told.violations_count
    assert found.devices == devices()
    assert found.cold_start_s == pytest.approx(3.0, abs=0.1)


def test_what_can_not_be_replayed_is_named(outcome: SimResult) -> None:
    with pytest.raises(InvalidError, match="at least one pass"):
        scenario_of_recording(RecordedLoad(()), Process.EVEN)
    idle = RecordedLoad((RecordedTick(1.0, ()),))
    with pytest.raises(InvalidError, match="a function with a prediction and requests"):
        scenario_of_recording(idle, Process.EVEN)


def test_hybrid_gives_up_parked_instances_that_nobody_needs() -> None:
    """They keep their memory: after a peak they go, one after the other."""
    table = synthetic_table("f", device_model="emu", slo_ms=60, fixed_s=0.01, item_s=0.005, speed={10: 0.5, 25: 1.0})
    spec = synthetic_spec("f", slo_ms=60)
    steps = (RateStep(60, 5.0), RateStep(30, 150.0), RateStep(300, 2.0))
    load = FunctionLoad(spec, (table,), steps, Process.POISSON)
    infos = tuple(replace(info, sm_rungs_pct=(10, 25)) for info in devices())  # type: ignore[type-var]
    outcome = simulate(Scenario(infos, (load,), 390.0, lend=True), make_live_policy("hybrid", retire_s=30.0))  # type: ignore[arg-type]
    counts = [(at_s, len(decision.desired)) for at_s, decision in outcome.decisions]
    peak = max(count for _, count in counts)
    assert peak >= 2
    assert counts[-1][1] < peak
    assert outcome.functions["f"].actions[ActionKind.HORIZONTAL_DOWN] >= 1
