"""Moves in virtual time: a GPU is freed, room is made, a node is emptied; capacity never falls, no request is lost."""

from __future__ import annotations

from random import Random

from hasgpu_core.cluster import ClusterSnapshot
from hasgpu_core.events import DesiredInstance, InstanceEvent
from hasgpu_core.function import MIB
from hasgpu_core.policy.scaling import Decision, PolicyState
from hasgpu_core.resources import Allocation, DeviceInfo
from hasgpu_sim import FunctionLoad, Scenario, SimResult, Timing, simulate
from hasgpu_sim.arrivals import Process, RateStep, arrival_times_s
from hasgpu_sim.recording import RecordedInput
from hasgpu_sim.scenario import Moving, NodeDrain, NodeLoss
from hasgpu_sim.synthetic import synthetic_spec, synthetic_table

START_S = 5.0
MOVING = Moving(period_s=10.0, cooldown_s=15.0)


def devices(nodes: int, memory_mib: int = 8192) -> tuple[DeviceInfo, ...]:
    return tuple(DeviceInfo(f"n{i}", "g0", "m", "emulated", memory_mib * MIB, (25, 50, 75, 100)) for i in range(nodes))


def function(name: str, *shares: tuple[int, int], rate_rps: float = 0.0, seconds: float = 120.0) -> FunctionLoad:
    """One that is held with these (SM share, quota)."""
    table = synthetic_table(
        name, device_model="m", slo_ms=500, fixed_s=0.005, item_s=0.010, speed={25: 0.5, 50: 0.8, 100: 1.0}
    )
    desired = tuple(
        DesiredInstance(f"{name}-{i}", Allocation(sm_pct, permille, permille, 512 * MIB))
        for i, (sm_pct, permille) in enumerate(shares)
    )
    times = arrival_times_s((RateStep(seconds, rate_rps),), Process.POISSON, Random(3)) if rate_rps else ()
    spec = synthetic_spec(name, slo_ms=500)
    return FunctionLoad(spec, (table,), desired=desired, held=True, arrivals_s=times)


def run(*loads: FunctionLoad, nodes: int = 3, seconds: float = 120.0, **fields: object) -> SimResult:
    fields.setdefault("moving", MOVING)
    timing = Timing(cold_start_s=START_S)
    return simulate(Scenario(devices(nodes), loads, seconds, timing=timing, **fields))  # type: ignore[arg-type]


def places(outcome: SimResult) -> dict[str, list[tuple[float, str, str]]]:
    """Where each instance is told to be, in its order: (time, node, state)."""
    told: dict[str, list[tuple[float, str, str]]] = {}
    for entry in outcome.recording.entries:
        if isinstance(entry, RecordedInput) and isinstance(entry.event, InstanceEvent):
            event = entry.event
            told.setdefault(event.instance, []).append((entry.at_s, event.node, event.state.name))
    return told


def test_a_node_that_drains_is_emptied_and_no_request_is_lost() -> None:
    drains = (NodeDrain("n0", 20.0),)
    outcome = run(function("f", (50, 1000), rate_rps=20.0), nodes=2, drains=drains)
    ((at_s, instance, old, new),) = outcome.moves
    assert (instance, old, new) == ("f-0", "n0/g0", "n1/g0")
    assert 20.0 + START_S <= at_s <= 20.0 + START_S + 2.0
    assert [(node, state) for _, node, state in places(outcome)["f-0"]] == [("n0", "READY"), ("n1", "READY")]
    found = outcome.functions["f"]
    assert found.refused_count == found.expired_count == 0
    assert len(found.latencies_s) + found.unanswered_count == found.requests_count
    still = run(function("f", (50, 1000), rate_rps=20.0), nodes=2, drains=drains, moving=None)
    assert still.moves == ()
    # It has both places while the new one starts.
    assert found.gpu_seconds - still.functions["f"].gpu_seconds > 0.5 * START_S * 0.99
    assert found.gpu_seconds - still.functions["f"].gpu_seconds < 0.5 * (START_S + 1.0)


class Scripted:
    """`x` and `y` go at 20 s; `big` is wanted from 25 s on."""

    name = "scripted"

    def decide(
        self, snapshot: ClusterSnapshot, state: PolicyState, now_s: float
    ) -> tuple[tuple[Decision, ...], PolicyState]:
        decisions = []
        for view in snapshot.functions:
            name = view.spec.name
            desired = tuple(DesiredInstance(i.instance, i.allocation) for i in view.instances)
            if name in "xy" and now_s >= 20.0:
                desired = ()
            if name == "big" and now_s >= 25.0:
                desired = (DesiredInstance("big-0", Allocation(100, 1000, 1000, 512 * MIB)),)
            decisions.append(Decision(name, desired, (), "", 1.0, 1, None, None, 0.0))
        return tuple(decisions), state


def halves(*more: FunctionLoad, seconds: float = 80.0) -> SimResult:
    """Two GPUs full of halves (a and x, b and y), of which one goes from each."""
    loads = (*(function(name, (50, 1000), rate_rps=8.0, seconds=seconds) for name in "axby"), *more)
    timing = Timing(cold_start_s=START_S)
    return simulate(Scenario(devices(2), loads, seconds, timing=timing, moving=MOVING), Scripted())


def test_a_gpu_is_freed_where_its_instances_fit_beside_others() -> None:
    outcome = halves()
    ((_, instance, old, new),) = outcome.moves
    assert instance in ("a-0", "b-0")
    assert {old, new} == {"n0/g0", "n1/g0"}
    told = places(outcome)
    assert told["a-0"][-1][1] == told["b-0"][-1][1]
    for name in "ab":
        found = outcome.functions[name]
        assert found.refused_count == found.expired_count == 0


def test_room_is_made_for_one_that_waits() -> None:
    """Two GPUs are half full each: a whole one only fits when one of the halves moves to the other GPU."""
    outcome = halves(function("big"))
    ((moved_s, instance, _, _),) = outcome.moves
    assert instance in ("a-0", "b-0")
    told = places(outcome)["big-0"]
    assert told[0][0] >= moved_s
    assert told[-1][2] == "READY"


def test_what_has_moved_rests_and_nothing_moves_to_and_fro() -> None:
    loads = [function(name, (25, 300)) for name in "abcd"]
    outcome = run(*loads, nodes=3, seconds=300.0)
    moved = [instance for _, instance, _, _ in outcome.moves]
    assert len(moved) == len(set(moved))


def test_a_move_whose_new_node_is_lost_is_given_up_and_the_old_place_serves() -> None:
    drains = (NodeDrain("n0", 20.0),)
    losses = (NodeLoss("n1", 22.0),)
    outcome = run(function("f", (50, 1000), rate_rps=10.0), nodes=2, drains=drains, losses=losses)
    assert outcome.moves == ()
    found = outcome.functions["f"]
    assert found.refused_count == found.expired_count == 0
    assert {node for _, node, _ in places(outcome)["f-0"]} == {"n0"}
    assert found.gpu_seconds < 0.5 * (120.0 + START_S)
