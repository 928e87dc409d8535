"""A policy that takes over brings what it finds to its own shape, the new before the old, and loses no request."""

from __future__ import annotations

from random import Random

import pytest
from hasgpu_core.cluster import ClusterSnapshot
from hasgpu_core.events import DesiredInstance
from hasgpu_core.function import MIB
from hasgpu_core.policy.choice import LIVE_POLICIES, make_live_policy
from hasgpu_core.policy.scaling import Decision, PolicyState, ScalingPolicy
from hasgpu_core.resources import Allocation, DeviceInfo
from hasgpu_sim import FunctionLoad, Scenario, SimResult, simulate
from hasgpu_sim.arrivals import Process, RateStep, arrival_times_s
from hasgpu_sim.synthetic import synthetic_spec, synthetic_table

SWITCH_S = 60.0
END_S = 150.0
TABLE = synthetic_table(
    "f", device_model="m", slo_ms=400, fixed_s=0.008, item_s=0.012, speed={25: 0.5, 50: 0.8, 75: 0.95, 100: 1.0}
)


class Switching:
    """One policy until a time, another from then on; without the first one's memory, as the scaler does it."""

    def __init__(self, first: ScalingPolicy, second: ScalingPolicy) -> None:
        self._first, self._second = first, second
        self._switched = False

    @property
    def name(self) -> str:
        return self._second.name

    def decide(
        self, snapshot: ClusterSnapshot, state: PolicyState, now_s: float
    ) -> tuple[tuple[Decision, ...], PolicyState]:
        if now_s < SWITCH_S:
            return self._first.decide(snapshot, state, now_s)
        if not self._switched:
            self._switched, state = True, PolicyState()
        return self._second.decide(snapshot, state, now_s)


def run(first: str, second: str, *, gpus: int = 3, rate_rps: float = 12.0, max_instances: int = 6) -> SimResult:
    devices = tuple(DeviceInfo("n0", f"g{i}", "m", "emulated", 8192 * MIB, (25, 50, 75, 100)) for i in range(gpus))
    steps = (RateStep(END_S, rate_rps),)
    times = arrival_times_s(steps, Process.POISSON, Random(4))
    load = FunctionLoad(synthetic_spec("f", slo_ms=400, max_instances=max_instances), (TABLE,), arrivals_s=times)
    policy = Switching(make_live_policy(first), make_live_policy(second))
    return simulate(Scenario(devices, (load,), END_S, lend=True), policy)


def shapes(outcome: SimResult) -> set[tuple[int, int]]:
    """(SM share, request) of what is there at the end."""
    last_s = max(sample.at_s for sample in outcome.shares)
    return {(s.sm_pct, s.request_permille) for s in outcome.shares if s.at_s == last_s}


def ready_at_every_look(outcome: SimResult) -> bool:
    """Whether an instance with a share worth the name served at every look from the switch on."""
    looks = {s.at_s for s in outcome.shares if s.at_s >= SWITCH_S}
    served = {s.at_s for s in outcome.shares if s.ready}
    return looks <= served


@pytest.mark.parametrize("second", LIVE_POLICIES)
@pytest.mark.parametrize("first", LIVE_POLICIES)
def test_no_request_is_lost_when_the_policy_changes(first: str, second: str) -> None:
    outcome = run(first, second)
    found = outcome.functions["f"]
    assert found.refused_count == found.expired_count == 0
    assert found.unanswered_count <= 2
    assert ready_at_every_look(outcome)
    if "hasgpu-released" not in (first, second):  # it reads no latency, and is late when it is alone, too
        assert len([at_s for at_s in found.violated_s if SWITCH_S <= at_s < SWITCH_S + 20]) <= 4


@pytest.mark.parametrize("first", [name for name in LIVE_POLICIES if name != "kserve"])
def test_a_replica_of_kserve_is_a_whole_gpu(first: str) -> None:
    assert shapes(run(first, "kserve")) == {(100, 1000)}


@pytest.mark.parametrize("first", [name for name in LIVE_POLICIES if name != "fastgshare"])
def test_fastgshare_has_configurations_that_it_would_choose(first: str) -> None:
    chosen = set().union(*(shapes(run("fastgshare", "fastgshare", rate_rps=rate)) for rate in (1, 4, 8, 12, 16, 24)))
    found = shapes(run(first, "fastgshare"))
    dearest = max(sm_pct * permille for sm_pct, permille in chosen)
    assert max(sm_pct * permille for sm_pct, permille in found) <= dearest < 50_000


@pytest.mark.parametrize("first", [name for name in LIVE_POLICIES if name != "hasgpu"])
def test_hasgpu_has_whole_steps(first: str) -> None:
    outcome = run(first, "hasgpu")
    assert all(permille % 100 == 0 for _, permille in shapes(outcome))
    last = outcome.decisions[-1][1].desired
    assert {item.allocation.limit_permille for item in last} == {1000}


@pytest.mark.parametrize("first", [name for name in LIVE_POLICIES if name != "hybrid"])
def test_hybrid_gives_whole_gpus_up(first: str) -> None:
    found = run(first, "hybrid")
    assert max(sm_pct for sm_pct, _ in shapes(found)) <= 50
    end_s = [s for s in found.shares if s.at_s > END_S - 10]
    cost = sum(s.sm_pct * s.request_permille for s in end_s) / len({s.at_s for s in end_s})
    assert cost < 10_000  # a tenth of a GPU


def test_without_room_for_the_new_the_old_serves_on() -> None:
    """On one GPU a whole one does not fit beside what is there: its function is served all the same."""
    devices = (DeviceInfo("n0", "g0", "m", "emulated", 8192 * MIB, (25, 50, 75, 100)),)
    held = Allocation(25, 500, 500, MIB)
    times = arrival_times_s((RateStep(60.0, 5.0),), Process.POISSON, Random(4))
    load = FunctionLoad(
        synthetic_spec("f", slo_ms=400), (TABLE,), arrivals_s=times, desired=(DesiredInstance("f-0", held),)
    )
    outcome = simulate(Scenario(devices, (load,), 60.0), make_live_policy("kserve"))
    assert {s.instance for s in outcome.shares} == {"f-0"}
    assert outcome.functions["f"].refused_count == outcome.functions["f"].expired_count == 0
    said = [tick.decisions[0].reason for tick in outcome.recording.ticks if tick.decisions]
    assert any("no room for its own shape beside f-0, which serve on" in reason for reason in said)
