"""When GPUs run out: the stated order of who suffers, and bursts met from standby."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hasgpu_core.cluster import ClusterSnapshot, DemandView, FunctionView, InstanceView
from hasgpu_core.errors import InvalidError
from hasgpu_core.function import SloClass
from hasgpu_core.policy.hybrid import HybridPolicy, HybridSettings
from hasgpu_core.policy.scaling import Decision, PolicyState
from hasgpu_core.resources import Allocation, DeviceInfo, DeviceState, InstanceState, Row
from hasgpu_sim import simulate
from hasgpu_sim.arrivals import Process, RateStep, arrival_times_s
from hasgpu_sim.evaluate import LEAD_S, Settings, function_load, scenario_of
from hasgpu_sim.scenario import FunctionLoad
from hasgpu_sim.surface import filled_surface

SURFACE = filled_surface(
    "made-up",
    "emu",
    {
        (batch, sm_pct, quota): (0.004 + 0.016 * (0.6 + 0.4 * batch) * 30 / (30 + sm_pct)) * 1000 / quota
        for batch in (1, 2, 4, 8)
        for sm_pct in (20, 50, 100)
        for quota in range(100, 1001, 100)
    },
)
SETTINGS = Settings(gpus=1, lend=False, tick_s=0.25, max_instances=16)
GPU = DeviceInfo("n0", "gpu0", "emu", "emulated", 16 << 30, SURFACE.sm_pcts)


def load(name: str, slo_class: SloClass, *steps: RateStep, weight: int = 100) -> FunctionLoad:
    times = arrival_times_s(steps, Process.POISSON, Random(len(name)))
    found = function_load(name, SURFACE, 4.0, times, SETTINGS)
    return replace(found, spec=replace(found.spec, slo_class=slo_class, weight=weight))


def view(
    name: str, slo_class: SloClass, *, active: int = 0, parked: int = 0, row: int = 0, weight: int = 100
) -> FunctionView:
    """A function with instances of SM 20 % in rows of their own, from `row` on."""
    found = load(name, slo_class, weight=weight)
    instances = tuple(
        InstanceView(
            f"{name}-{i}",
            Allocation(20, 1000, 1000, found.spec.memory_bytes),
            InstanceState.READY,
            "n0",
            "gpu0",
            row + i,
            "emu",
            standby=i >= active,
        )
        for i in range(active + parked)
    )
    demand = DemandView(rate_rps=5.0, arrived_items_count=100)
    return FunctionView(found.spec, 1, demand, instances, {"emu": found.tables[0]}, next_ordinal=active + parked)


def decided(*views: FunctionView) -> dict[str, Decision]:
    """One pass over a GPU that these instances fill."""
    count = sum(len(v.instances) for v in views)
    assert count == 5
    device = DeviceState(GPU, tuple(Row(i, 20, 1000) for i in range(count)), 0)
    ordered = tuple(sorted(views, key=lambda v: v.spec.name))
    decisions, _ = HybridPolicy(HybridSettings(lend=False)).decide(
        ClusterSnapshot(ordered, (device,)), PolicyState(), 0
    )
    return {decision.function: decision for decision in decisions}


def kept(decision: Decision) -> list[str]:
    return [desired.instance for desired in decision.desired]


def test_parked_instances_of_the_lowest_class_go_first() -> None:
    found = decided(
        view("crit", SloClass.CRITICAL),
        view("batch", SloClass.BEST_EFFORT, active=2, parked=1, row=0),
        view("shop", SloClass.STANDARD, active=1, parked=1, row=3),
    )
    assert kept(found["batch"]) == ["batch-0", "batch-1"]
    assert kept(found["shop"]) == ["shop-0", "shop-1"]
    assert "batch-2 is given up for crit (critical)" in found["batch"].reason
    assert "batch-2 will make room" in found["crit"].reason


def test_then_instances_beyond_the_first_of_lower_classes_least_weight_first() -> None:
    found = decided(
        view("crit", SloClass.CRITICAL),
        view("light", SloClass.STANDARD, active=2, row=0, weight=50),
        view("heavy", SloClass.STANDARD, active=3, row=2, weight=200),
    )
    assert kept(found["light"]) == ["light-0"]
    assert kept(found["heavy"]) == ["heavy-0", "heavy-1", "heavy-2"]


def test_a_last_instance_goes_only_for_who_has_nothing() -> None:
    others = [view(f"b{i}", SloClass.BEST_EFFORT, active=1, row=i) for i in range(5)]
    found = decided(view("crit", SloClass.CRITICAL), *others)
    assert sum(len(d.desired) for name, d in found.items() if name != "crit") == 4
    mine = view("crit", SloClass.CRITICAL, active=1, row=0)
    mine = replace(mine, demand=DemandView(rate_rps=500.0, queued_items_count=50, arrived_items_count=100))
    found = decided(mine, *(view(f"b{i}", SloClass.BEST_EFFORT, active=1, row=i + 1) for i in range(4)))
    assert all(len(d.desired) == 1 for name, d in found.items() if name != "crit")


def test_nothing_is_taken_from_the_same_class_or_a_higher_one() -> None:
    found = decided(
        view("late", SloClass.STANDARD),
        view("crit", SloClass.CRITICAL, active=1, parked=2, row=0),
        view("peer", SloClass.STANDARD, active=2, row=3),
    )
    assert len(found["crit"].desired) == 3
    assert len(found["peer"].desired) == 2
    assert "no room" in found["late"].reason


def test_a_critical_function_takes_its_room_within_seconds_and_others_keep_one() -> None:
    loads = [
        load("crit", SloClass.CRITICAL, RateStep(30, 1.0), RateStep(40, 200.0)),
        load("batch", SloClass.BEST_EFFORT, RateStep(70, 120.0)),
    ]
    outcome = simulate(scenario_of(loads, SURFACE, 70.0, SETTINGS), HybridPolicy(HybridSettings(lend=False)))
    reasons = [d.reason for t, d in outcome.decisions if t > 30 and d.function == "batch"]
    assert any("is given up for crit (critical)" in reason for reason in reasons)
    last = list(outcome.recording.ticks)[-1]
    by_name = {d.function: d for d in last.decisions}
    assert by_name["crit"].capacity_rps >= 150.0
    assert by_name["batch"].desired


def test_a_burst_is_met_from_standby_within_a_tick_of_the_scaler() -> None:
    """Vertical growth: shares of ready instances change; instances that start come later to take over."""
    settings = replace(SETTINGS, gpus=2, tick_s=0.1)
    times = arrival_times_s([RateStep(60, 4.0), RateStep(20, 24.0)], Process.EVEN, Random(1))
    found = function_load("f", SURFACE, 4.0, times, settings)
    outcome = simulate(scenario_of([found], SURFACE, 80.0, settings), HybridPolicy(HybridSettings(lend=False)))
    covered = [t.at_s - LEAD_S for t in outcome.recording.ticks if t.decisions[0].capacity_rps >= 24.0]
    assert min(at_s for at_s in covered if at_s >= 60.0) <= 60.8


def test_weights_and_classes_are_validated() -> None:
    spec = load("f", SloClass.STANDARD).spec
    with pytest.raises(InvalidError, match=r"weight: expected 1\.\.10000, got 0"):
        replace(spec, weight=0).validate()
