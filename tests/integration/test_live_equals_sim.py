"""One recorded load through the simulator and through the live scaler's shell gives equal decisions.

The live side gets every event as bytes over the bus, keeps its desired state in the store, and decides in its own loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hasgpu_core import events as ev
from hasgpu_core.capacity import CapacityPoint, CapacityTable, capacity_rps
from hasgpu_core.clock import ManualClock
from hasgpu_core.events import DesiredInstance
from hasgpu_core.function import MIB, Artifact, FunctionSpec, ModelFormat, TensorSpec
from hasgpu_core.observe import ClusterObserver
from hasgpu_core.policy.choice import LIVE_POLICIES, make_live_policy
from hasgpu_core.policy.hasgpu import HasGpuPolicy
from hasgpu_core.policy.rivals import StaticPeakPolicy
from hasgpu_core.policy.scaling import ActionKind, Decision, PolicyState, ScalingPolicy, ScalingSettings
from hasgpu_core.ports import Fence
from hasgpu_core.resources import Allocation, DeviceInfo
from hasgpu_runtime import wire
from hasgpu_runtime.bus.memory import MemoryBus
from hasgpu_runtime.store.memory import MemoryStore
from hasgpu_runtime.telemetry import Telemetry
from hasgpu_scaler import records
from hasgpu_scaler.adapters.desired_store import PREFIX, DesiredStore
from hasgpu_scaler.adapters.recording_files import RecordingFiles
from hasgpu_scaler.app import ScalerApp
from hasgpu_scaler.core import ScalerCore
from hasgpu_scaler.recorder import Recorder, RecordingObserver
from hasgpu_scaler.records import DesiredRecord
from hasgpu_sim.arrivals import Process, RateStep, hasgpu_steps
from hasgpu_sim.recording import (
    InitialDesired,
    InstanceGone,
    RecordedEvent,
    RecordedInput,
    RecordedLoad,
    read_recording,
    replay,
)
from hasgpu_sim.scenario import FunctionLoad, Scenario
from hasgpu_sim.simulate import simulate

MODEL = "cpu-2c"


class Remembering:
    """A policy, and what it decided."""

    def __init__(self, policy: ScalingPolicy) -> None:
        self._policy = policy
        self.decided: list[tuple[Decision, ...]] = []

    @property
    def name(self) -> str:
        return self._policy.name

    def decide(self, snapshot, state: PolicyState, now_s: float) -> tuple[tuple[Decision, ...], PolicyState]:
        decisions, state = self._policy.decide(snapshot, state, now_s)
        self.decided.append(decisions)
        return decisions, state


def spec(name: str, **fields: int) -> FunctionSpec:
    tensors = (TensorSpec("x", "FP32", (-1, 4)),)
    declared = FunctionSpec(
        name=name,
        format=ModelFormat.PYTHON,
        artifact=Artifact("0" * 64, 1),
        entry="handler.py",
        inputs=tensors,
        outputs=tensors,
        slo_ms=250,
        memory_bytes=256 * MIB,
    )
    return replace(declared, **fields)


def table(function: str, latency_s: float, slo_s: float = 0.25) -> CapacityTable:
    """A grid as rapp publishes it; through the wire once, because that rounds to µs and thousandths."""
    points = []
    for batch in (1, 2, 4, 8):
        for sm_pct in (25, 50, 75, 100):
            for quota in range(50, 1_001, 50):
                taken_s = latency_s * (0.4 + 0.6 * batch) / (sm_pct / 100) / (quota / 1_000)
                rate = capacity_rps(batch=batch, latency_s=taken_s, slo_s=slo_s)
                points.append(CapacityPoint(batch, sm_pct, quota, taken_s, rate))
    made = CapacityTable(function, 1, MODEL, 1, 0, round(slo_s * 1e3), tuple(points))
    return wire.decode_capacity(wire.encode(made))


def devices(count: int) -> tuple[DeviceInfo, ...]:
    return tuple(
        DeviceInfo(f"n{i}", "cpu0", MODEL, "cpu", 8_192 * MIB, (25, 50, 75, 100), ("time: gate",)) for i in range(count)
    )


STEADY_THEN_BURST = Scenario(
    devices=devices(2),
    functions=(
        FunctionLoad(
            spec("burst", min_instances=0),
            (table("burst", 0.012),),
            (RateStep(5.0, 0.0), RateStep(20.0, 20.0), RateStep(15.0, 90.0), RateStep(60.0, 4.0), RateStep(40.0, 0.0)),
            Process.POISSON,
        ),
        FunctionLoad(
            spec("parked", standby=1, max_instances=3),
            (table("parked", 0.02),),
            (RateStep(20.0, 5.0), RateStep(20.0, 60.0), RateStep(100.0, 5.0)),
        ),
        FunctionLoad(
            spec("held"),
            (table("held", 0.02),),
            (RateStep(140.0, 30.0),),
            desired=(DesiredInstance("held-0", Allocation(25, 200, 400, 256 * MIB)),),
            held=True,
        ),
    ),
    duration_s=140.0,
    seed=7,
)
HASGPU = Scenario(
    devices=devices(1),
    functions=(FunctionLoad(spec("paper"), (table("paper", 0.03),), hasgpu_steps(stage_s=2.0)),),
    duration_s=100.0,
)


@asynccontextmanager
async def live_scaler(
    load: RecordedLoad, clock: ManualClock, policy: Remembering, recorder: Recorder | None = None
) -> AsyncIterator[tuple[ScalerApp, MemoryBus]]:
    """A scaler that leads, with the recording's first desired states in its store."""
    bus, store = MemoryBus(), MemoryStore(clock)
    for entry in load.entries:
        if isinstance(entry, RecordedInput) and isinstance(entry.event, InitialDesired):
            first = entry.event
            record = DesiredRecord(first.function, 1, first.instances, first.next_ordinal, paused=first.held)
            await store.compare_and_set(PREFIX + first.function, records.encode(record), expected_revision=0)
    fence = await store.acquire_lease("scaler", "live", ttl_s=3.0)
    assert isinstance(fence, Fence)
    app = ScalerApp(
        bus=bus,
        desired=DesiredStore(store),
        clock=clock,
        core=ScalerCore(
            policy=policy,
            observer=RecordingObserver(recorder) if recorder is not None else ClusterObserver(),
            clock=clock,
            recorder=recorder,
        ),
        telemetry=Telemetry(),
        fence=lambda: fence,
        fenced=lambda: None,
        poke=lambda: None,
    )
    tasks = [asyncio.ensure_future(app.watch()), asyncio.ensure_future(app.listen())]
    await app.wait_caught_up()
    try:
        yield app, bus
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def tell(bus: MemoryBus, event: RecordedEvent) -> None:
    """Says an event as its owner would."""
    match event:
        case ev.FunctionEvent():
            await bus.put(ev.function_subject(event.spec.name), wire.encode(event))
        case ev.DemandEvent():
            await bus.publish(ev.demand_subject(event.function, event.gateway), wire.encode(event))
        case ev.InstanceEvent():
            await bus.put(ev.instance_subject(event.function, event.instance), wire.encode(event))
        case InstanceGone():
            await bus.delete(ev.instance_subject(event.function, event.instance))
        case ev.DeviceEvent():
            await bus.publish(ev.device_subject(event.device.node, event.device.gpu), wire.encode(event))
        case ev.NodeEvent():
            await bus.put(ev.node_subject(event.node), wire.encode(event))
        case CapacityTable():
            await bus.put(ev.capacity_subject(event.function, event.device_model), wire.encode(event))
        case InitialDesired():
            pass  # found in the store


async def hear(bus: MemoryBus, entry: RecordedInput) -> None:
    """Says a recorded event, and lets the scaler take it in."""
    await tell(bus, entry.event)
    for _ in range(5):
        await asyncio.sleep(0)


async def run_live(
    load: RecordedLoad, decides: ScalingPolicy, recorder: Recorder | None = None, clock: ManualClock | None = None
) -> Sequence[tuple[Decision, ...]]:
    """Returns what the live scaler decides at each tick of the recording."""
    clock, policy = clock or ManualClock(0.0), Remembering(decides)
    async with live_scaler(load, clock, policy, recorder) as (app, bus):
        for entry in load.entries:
            clock.advance(entry.at_s - clock.now_s())
            if isinstance(entry, RecordedInput):
                await hear(bus, entry)
            else:
                await app.run_pass()
    return policy.decided


def make(policy: str, scenario: Scenario) -> ScalingPolicy:
    """A policy without memory, as the scaler and the simulator make it."""
    if policy == "static-peak":
        return StaticPeakPolicy({load.spec.name: 40.0 for load in scenario.functions})
    return make_live_policy(policy)


ACTS = {
    "hybrid": {ActionKind.VERTICAL_DOWN, ActionKind.HORIZONTAL_UP},
    "hasgpu": {ActionKind.VERTICAL_UP, ActionKind.VERTICAL_DOWN},
}
"""What a policy does in these scenarios at least; otherwise equality would say little."""


@pytest.mark.parametrize("scenario", [STEADY_THEN_BURST, HASGPU], ids=["mixed", "hasgpu"])
@pytest.mark.parametrize("policy", [*LIVE_POLICIES, "static-peak"])
async def test_live_and_simulated_decisions_are_equal(policy: str, scenario: Scenario) -> None:
    load = simulate(scenario, make(policy, scenario)).recording
    expected = [tick.decisions for tick in load.ticks]
    kinds = {action.kind for decisions in expected for decision in decisions for action in decision.actions}
    assert kinds >= ACTS.get(policy, {ActionKind.HORIZONTAL_UP})
    live = await run_live(load, make(policy, scenario))
    assert len(live) == len(expected)
    for index, (mine, theirs) in enumerate(zip(live, expected, strict=True)):
        assert mine == theirs, f"tick {index}"


class Switching:
    """One policy until a time, another without its memory from then on: what `hasgpu policy set` does."""

    def __init__(self, first: ScalingPolicy, second: ScalingPolicy) -> None:
        self._policies = [first, second]

    @property
    def name(self) -> str:
        return self._policies[0].name

    def decide(self, snapshot, state: PolicyState, now_s: float) -> tuple[tuple[Decision, ...], PolicyState]:
        if now_s >= SWITCH_S and len(self._policies) > 1:
            del self._policies[0]
            state = PolicyState()
        return self._policies[0].decide(snapshot, state, now_s)


SWITCH_S = 45.0


@pytest.mark.parametrize("second", LIVE_POLICIES)
async def test_a_change_of_the_policy_is_the_same_live_and_simulated(second: str) -> None:
    first = "kserve" if second == "hybrid" else "hybrid"
    policy = Switching(make(first, STEADY_THEN_BURST), make(second, STEADY_THEN_BURST))
    load = simulate(STEADY_THEN_BURST, policy).recording
    clock, live, changed = ManualClock(0.0), Remembering(make(first, STEADY_THEN_BURST)), False
    async with live_scaler(load, clock, live) as (app, bus):
        for entry in load.entries:
            clock.advance(entry.at_s - clock.now_s())
            if isinstance(entry, RecordedInput):
                await hear(bus, entry)
                continue
            if entry.at_s >= SWITCH_S and not changed:
                decided, live = live.decided, Remembering(make(second, STEADY_THEN_BURST))
                changed, live.decided = True, decided
                app.core.set_policy(live)
            await app.run_pass()
    expected = [tick.decisions for tick in load.ticks]
    assert live.decided == expected
    assert any(d.actions for tick in load.ticks if tick.at_s >= SWITCH_S for d in tick.decisions)


async def test_the_mixed_load_exercises_every_kind_of_action() -> None:
    result = simulate(STEADY_THEN_BURST)
    kinds = {action.kind for _, decision in result.decisions for action in decision.actions}
    assert kinds == set(ActionKind)


def test_a_recording_replays_to_its_own_decisions() -> None:
    load = simulate(HASGPU).recording
    assert replay(load, HasGpuPolicy(ScalingSettings())) == tuple(load.ticks)


@pytest.mark.parametrize("policy", ["hybrid", "hasgpu", "kserve"])
async def test_what_the_live_scaler_records_replays_to_what_it_decided(policy: str, tmp_path: Path) -> None:
    load = simulate(STEADY_THEN_BURST, make(policy, STEADY_THEN_BURST)).recording
    clock = ManualClock(0.0)
    files = RecordingFiles(tmp_path, 1 << 30)
    recorder = Recorder(files, clock)
    live = await run_live(load, make(policy, STEADY_THEN_BURST), recorder, clock)
    recorder.stop()
    (path,) = files.segments(0, 0)
    kept = read_recording(path)
    again = replay(kept, make(policy, STEADY_THEN_BURST))
    assert [tick.decisions for tick in again] == list(live)
    acted = [[d for d in tick.decisions if d.actions] for tick in kept.ticks]
    assert acted == [[d for d in decisions if d.actions] for decisions in live]
