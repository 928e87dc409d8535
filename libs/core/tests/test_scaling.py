"""What the policy does, and the faults that peers shipped."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hasgpu_core.cluster import DemandView
from hasgpu_core.errors import InvalidError
from hasgpu_core.policy.scaling import ActionKind, PolicyState, ScalingSettings
from hasgpu_core.resources import PARKED_QUOTA_PERMILLE, InstanceState
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

UP, DOWN = ActionKind.VERTICAL_UP, ActionKind.VERTICAL_DOWN
ADD, REMOVE = ActionKind.HORIZONTAL_UP, ActionKind.HORIZONTAL_DOWN


def kinds(decisions: Any) -> list[ActionKind]:
    return [action.kind for decision in decisions for action in decision.actions]


# Starting


def test_the_first_instance_is_the_cheapest_inside_the_slo(make: Any, bench: Any) -> None:
    world = bench()
    world.deploy(make.spec(), make.table())
    decision = world.tick()["f"]
    (action,) = decision.actions
    assert (action.kind, action.sm_pct, action.to_permille) == (ADD, 25, 100)  # not SM 30 %, quota 30 %
    (want,) = decision.desired
    assert want.instance == "f-0"
    assert want.allocation.limit_permille == 1000
    assert decision.next_ordinal == 1
    assert decision.horizontal
    assert world.tick()["f"].actions == ()


def test_a_slow_configuration_is_left_out_with_the_margin(make: Any, bench: Any) -> None:
    world = bench()
    world.deploy(make.spec(slo_ms=210), make.table(slo_ms=210))  # SM 25 %, quota 10 % takes 200 ms
    (action,) = world.tick()["f"].actions
    assert (action.sm_pct, action.to_permille) != (25, 100)


def test_without_a_prediction_the_fixed_start_is_used(make: Any, bench: Any) -> None:
    world = bench()
    world.deploy(make.spec())
    decision = world.tick(f=3.0)["f"]
    assert [(a.sm_pct, a.to_permille) for a in decision.actions] == [(50, 500)]
    assert "no prediction" in decision.reason
    assert world.run(20, f=100.0) == []


def test_min_instances_are_there_without_any_demand_data(make: Any, bench: Any) -> None:
    """A metrics outage must not leave replicas below the floor (Dynamo PR #14575)."""
    world = bench()
    world.deploy(make.spec(min_instances=3), make.table())
    world.tick()
    assert len(world.requests()) == 3
    del world.instances["f"]["f-1"]
    world.tick(f=None)
    assert sorted(world.requests()) == ["f-0", "f-2", "f-3"]


def test_without_devices_nothing_is_asked_and_the_reason_says_so(make: Any) -> None:
    from hasgpu_core.cluster import ClusterSnapshot, FunctionView
    from hasgpu_core.policy.hasgpu import HasGpuPolicy

    view = FunctionView(make.spec(), 1, DemandView(5.0), (), {"cpu-2c": make.table()})
    (decision,), _ = HasGpuPolicy(ScalingSettings()).decide(ClusterSnapshot((view,), ()), PolicyState(), 0.0)
    assert decision.actions == ()
    assert "no device is known" in decision.reason


# Growing


def test_quotas_grow_first_in_steps_and_at_once(make: Any, bench: Any) -> None:
    world = bench()
    world.deploy(make.spec(), make.table())
    world.put("f", sm_pct=50, permille=100)
    world.run(5, f=5.0)
    before = world.requests()["f-0"]
    decision = world.tick(f=30.0)["f"]
    assert kinds([decision]) == [UP]
    after = world.requests()["f-0"]
    assert after > before
    assert after % 100 == 0
    # A step is followed at once; while the rate rises it is extrapolated, by a fifth at most.
    assert 30.0 <= decision.predicted_rps <= 36.0
    assert decision.needed_rps == pytest.approx(decision.predicted_rps / 0.9)
    table = make.table()
    assert table.capacity_rps(50, after) >= decision.needed_rps > table.capacity_rps(50, after - 100)
    for text in ("rps predicted (30.0 observed)", "needs ", f"f-0 {before // 10} % -> {after // 10} %"):
        assert text in decision.reason
    world.run(5, f=30.0)
    assert world.decisions[-1].predicted_rps == pytest.approx(30.0, abs=0.5)


def test_the_largest_sm_share_grows_first(make: Any, bench: Any) -> None:
    world = bench()
    world.deploy(make.spec(), make.table())
    world.put("f", sm_pct=25, permille=200)
    world.put("f", sm_pct=50, permille=200)
    decision = world.tick(f=40.0)["f"]
    assert [action.instance for action in decision.actions] == ["f-1"]


def test_a_full_row_makes_an_instance(make: Any, bench: Any) -> None:
    world = bench()
    world.deploy(make.spec("f"), make.table("f"))
    world.deploy(make.spec("g"), make.table("g"))
    world.put("f", sm_pct=25, permille=200)
    world.put("g", sm_pct=25, permille=700)
    decision = world.tick(f=60.0, g=20.0)["f"]
    assert kinds([decision]) == [UP, ADD]
    assert world.requests("f")["f-0"] == 300
    assert sum(row.used_permille for row in world.devices[0].rows if row.index == 0) == 1000


def test_functions_of_one_pass_do_not_take_the_same_room(make: Any, bench: Any) -> None:
    world = bench()  # its devices are checked for over-filled rows at every look
    for name in "abcdefgh":
        world.deploy(make.spec(name), make.table(name))
    for _ in range(20):
        world.tick(**dict.fromkeys("abcdefgh", 40.0))
    assert any("no room" in decision.reason or "missing" in decision.reason for decision in world.decisions)


def test_what_is_on_its_way_is_not_asked_for_twice(make: Any, bench: Any) -> None:
    world = bench(make.device("n0"), make.device("n1"))
    world.deploy(make.spec(), make.table())
    world.start_state = InstanceState.LOADING
    world.put("f", sm_pct=100, permille=1000)
    world.run(10, f=350.0)
    assert len(world.requests()) == 2
    decision = world.tick(f=350.0)["f"]
    assert decision.capacity_rps == pytest.approx(make.table().capacity_rps(100, 1000))  # READY ones only


def test_ready_instances_bridge_until_the_new_one_is_ready(make: Any, bench: Any) -> None:
    world = bench()
    world.deploy(make.spec(min_instances=2), make.table())
    world.start_state = InstanceState.LOADING
    world.put("f", sm_pct=25, permille=200)
    world.tick(f=25.0)
    assert world.instances["f"]["f-1"].state is InstanceState.LOADING
    assert world.requests()["f-0"] >= 500
    world.set_state("f-1", InstanceState.READY)
    assert DOWN in kinds(world.run(6, f=5.0))


def test_max_instances_bound(make: Any, bench: Any) -> None:
    world = bench(*(make.device(f"n{i}") for i in range(8)))
    world.deploy(make.spec(max_instances=3), make.table())
    world.run(10, f=100_000.0)
    assert len(world.requests()) == 3
    assert "max_instances (3) is reached" in world.decisions[-1].reason


def test_from_zero_no_gain_jumps_to_the_maximum(make: Any, bench: Any) -> None:
    """Ray PR #61731."""
    world = bench(*(make.device(f"n{i}") for i in range(8)))
    world.deploy(make.spec(min_instances=0, max_instances=100), make.table())
    world.start_state = InstanceState.LOADING
    world.run(3, f=DemandView(2.0, queued_items_count=500, oldest_wait_s=5.0))
    assert len(world.requests()) == 1


def test_a_backlog_makes_quotas_grow(make: Any, bench: Any) -> None:
    world = bench()
    world.deploy(make.spec(), make.table())
    world.put("f", permille=200)
    world.run(2, f=8.0)
    assert kinds([world.tick(f=DemandView(8.0, queued_items_count=1))["f"]]) == []
    assert kinds([world.tick(f=DemandView(8.0, queued_items_count=40))["f"]]) == [UP]
    assert "with 40 queued" in world.decisions[-1].reason


def test_missed_slo_raises_the_need_in_bounds_and_lapses(make: Any, bench: Any) -> None:
    world = bench()
    world.deploy(make.spec(), make.table())
    world.put("f", permille=200)
    assert world.run(5, f=8.0) == []
    missed = DemandView(8.0, p95_s=0.5)
    grown = world.run(40, f=missed)
    assert set(kinds(grown)) == {UP}
    assert "latency over the SLO of 300 ms" in grown[0].reason
    capacity = make.table().capacity_rps(50, world.requests()["f-0"])
    needed = world.decisions[-1].needed_rps
    assert needed is not None
    assert needed <= 3.0 * 8.0 / 0.9 + 1e-6
    assert capacity < 2 * 3.0 * 8.0 / 0.9
    assert kinds(world.run(25, f=DemandView(8.0, p95_s=0.1)))[-1] is DOWN


def test_what_the_feedback_asks_for_falls_with_the_load(make: Any, bench: Any) -> None:
    world = bench()
    world.deploy(make.spec(), make.table())
    world.put("f", permille=200)
    assert world.run(5, f=8.0) == []
    world.run(40, f=DemandView(8.0, p95_s=0.5))
    asked = world.decisions[-1].needed_rps
    assert asked is not None
    assert asked > 1.5 * 8.0 / 0.9
    world.run(6, f=DemandView(1.0, p95_s=0.1))  # well before the 15 s after which it lapses
    assert "asks for" in world.decisions[-1].reason
    needed = world.decisions[-1].needed_rps
    assert needed is not None
    assert needed <= 3.0 * 1.1 / 0.9 + 1e-6


def test_a_backlog_that_stays_although_quotas_are_at_their_ceiling_asks_for_an_instance(make: Any, bench: Any) -> None:
    """The table claims enough for the rate; the backlog says otherwise, and no quota can help."""
    world = bench()
    world.deploy(make.spec(), make.table())
    world.put("f", sm_pct=50, permille=1000)
    demand = DemandView(80.0, queued_items_count=60, oldest_wait_s=2.0, p95_s=0.5)
    world.run(4, f=demand)
    assert set(world.requests()) == {"f-0"}  # a short backlog is no reason for a cold start
    world.run(30, f=demand)
    assert len(world.requests()) > 1


# Shrinking


def test_quotas_come_down_to_the_smallest_that_keeps_the_slo(make: Any, bench: Any) -> None:
    """The released system's quotas ratchet up."""
    world = bench()
    world.deploy(make.spec(), make.table())
    world.put("f", sm_pct=50, permille=1000)
    world.run(2, f=30.0)
    assert world.requests()["f-0"] == 1000  # not before the hold
    world.run(30, f=0.5)
    assert world.requests()["f-0"] == 100
    slow = bench()
    slow.deploy(make.spec(), make.table(item_s=0.1))  # a quota of 10 % would take 1 s
    slow.put("f", sm_pct=50, permille=1000)
    slow.run(30, f=0.0)
    assert slow.requests()["f-0"] == 500


def test_a_dip_shorter_than_the_hold_lowers_nothing(make: Any, bench: Any) -> None:
    """Delay against look-back (Ray #26455), leaving a peak (Knative #3153)."""
    world = bench()
    world.deploy(make.spec(), make.table())
    world.put("f", permille=600)
    for _ in range(10):
        assert world.run(3.0, f=50.0) == []
        assert world.run(2.5, f=2.0) == []
    # What comes down after the hold is judged by its largest need, not by the last one.
    world.run(4.0, f=50.0)
    world.run(2.5, f=45.0)
    world.run(2.0, f=2.0)
    assert world.requests()["f-0"] < 600
    assert make.table().capacity_rps(50, world.requests()["f-0"]) >= 45.0 / 0.9


def test_holds_shorter_than_the_window_are_refused() -> None:
    with pytest.raises(InvalidError, match="quota_hold_s"):
        ScalingSettings(quota_hold_s=1.0)
    with pytest.raises(InvalidError, match="shrink_margin"):
        ScalingSettings(shrink_margin=1.5)


def test_an_instance_goes_when_the_survivors_can_absorb_its_load(make: Any, bench: Any) -> None:
    """Dynamo PR #9294."""
    table = make.table()
    world = bench()
    world.deploy(make.spec(), table)
    for _ in range(2):
        world.put("f", sm_pct=50, permille=600)
    assert REMOVE not in kinds(world.run(9.5, f=8.0))
    (decision,) = [d for d in world.run(3, f=8.0) if REMOVE in kinds([d])]
    assert [a.instance for a in decision.actions if a.kind is REMOVE] == ["f-1"]
    assert table.capacity_rps(50, world.requests()["f-0"]) >= 8 / 0.9
    alone = table.capacity_rps(50, 1000)
    busy = bench()
    busy.deploy(make.spec(), table)
    for _ in range(2):
        busy.put("f", sm_pct=50, permille=1000)
    assert REMOVE not in kinds(busy.run(60, f=0.9 * 0.75 * alone))  # one could not take it with the margin
    assert len(busy.requests()) == 2


def test_removals_keep_their_distance_and_the_floor(make: Any, bench: Any) -> None:
    world = bench()
    world.deploy(make.spec(min_instances=2), make.table())
    for _ in range(4):
        world.put("f", sm_pct=25, permille=200)
    times = [world.now_s for _ in range(160) if REMOVE in kinds([world.tick(f=0.5)["f"]])]
    assert len(world.requests()) == 2
    assert len(times) == 2
    assert times[1] - times[0] >= 10


def test_no_data_never_shrinks(make: Any, bench: Any) -> None:
    world = bench()
    world.deploy(make.spec(min_instances=0), make.table())
    for _ in range(2):
        world.put("f", permille=800)
    world.run(2, f=20.0)
    assert world.run(200, f=None) == []
    assert "no demand data" in world.decisions[-1].reason
    assert world.decisions[-1].predicted_rps is None


def test_zero_traffic_is_data_and_shrinks(make: Any, bench: Any) -> None:
    """Metrics that turn NaN at zero traffic froze others (Dynamo #6985)."""
    world = bench()
    world.deploy(make.spec(), make.table())
    world.put("f", permille=800)
    world.run(2, f=20.0)
    world.run(15, f=DemandView(0.0, p95_s=None))
    assert world.requests()["f-0"] == 100


def test_scale_to_zero_needs_an_idle_period_with_nothing_waiting_or_running(make: Any, bench: Any) -> None:
    world = bench()
    world.deploy(make.spec(min_instances=0), make.table())
    world.tick(f=0.0)
    assert world.requests() == {}
    world.tick(f=DemandView(None, queued_items_count=1))  # the first request is held, and starts one (KServe #2882)
    assert len(world.requests()) == 1
    world.run(29, f=0.0)
    world.run(2, f=DemandView(0.0, in_flight_count=1))
    world.run(29, f=0.0)
    assert len(world.requests()) == 1
    (decision,) = world.run(2, f=0.0)
    assert kinds([decision]) == [REMOVE]
    assert "scaled to zero" in decision.reason
    assert world.run(100, f=0.0) == []
    unknown = bench()
    unknown.deploy(make.spec(min_instances=0))
    unknown.put("f")
    unknown.run(32, f=0.0)
    assert unknown.requests() == {}
    keeps = bench()
    keeps.deploy(make.spec(min_instances=1), make.table())
    keeps.run(100, f=0.0)
    assert len(keeps.requests()) == 1


# Not oscillating


@pytest.mark.parametrize("rate", [5.0, 9.0, 14.3, 20.0, 33.0, 47.0, 60.0])
def test_jitter_does_not_flap(make: Any, bench: Any, rate: float) -> None:
    """At a rounding boundary (Ray PR #64468) or anywhere else."""
    world = bench()
    world.deploy(make.spec(), make.table())
    rng = Random(3)
    world.put("f", permille=100)
    world.run(20, f=rate)
    actions = []
    for _ in range(600):
        decision = world.tick(f=rate * rng.uniform(0.97, 1.03))["f"]
        actions += kinds([decision])
    assert len(actions) <= 2, actions


def test_exactly_at_the_boundary_of_every_quota(make: Any, bench: Any) -> None:
    table = make.table()
    for quota in range(100, 1000, 100):
        world = bench()
        world.deploy(make.spec(), table)
        world.put("f", permille=quota)
        boundary = 0.9 * table.capacity_rps(50, quota)
        flips = 0
        for i in range(200):
            decision = world.tick(f=boundary * (1.001 if i % 2 else 0.999))["f"]
            flips += len(decision.actions)
        assert flips <= 1


# Failures


def test_failing_instances_are_not_multiplied(make: Any, bench: Any) -> None:
    world = bench(*(make.device(f"n{i}") for i in range(4)))
    world.deploy(make.spec(), make.table())
    world.start_state = InstanceState.FAILED
    world.run(60, f=DemandView(100.0, queued_items_count=50, oldest_wait_s=3.0))
    assert len(world.requests()) == 1
    assert "has failed" in world.decisions[-1].reason


def test_one_failure_beside_ready_ones_is_replaced_once(make: Any, bench: Any) -> None:
    world = bench(*(make.device(f"n{i}") for i in range(4)))
    world.deploy(make.spec(), make.table())
    world.put("f", sm_pct=100, permille=1000)
    world.put("f", sm_pct=100, permille=1000, state=InstanceState.FAILED)
    world.start_state = InstanceState.FAILED
    world.run(60, f=300.0)
    assert len(world.requests()) == 3


def test_a_failed_instance_goes_first(make: Any, bench: Any) -> None:
    world = bench()
    world.deploy(make.spec(), make.table())
    world.put("f", sm_pct=25, permille=100, state=InstanceState.FAILED)
    world.put("f", sm_pct=25, permille=300)
    world.run(12, f=1.0)
    assert sorted(world.requests()) == ["f-1"]


def test_a_refused_quota_is_no_capacity(make: Any, bench: Any) -> None:
    """The agent has the last word; what it refuses has to come from elsewhere, and is not asked for again and again."""
    world = bench(make.device("n0"), make.device("n1"))
    world.deploy(make.spec(), make.table())
    world.put("f", sm_pct=50, permille=600)
    view = world.instances["f"]["f-0"]
    world.instances["f"]["f-0"] = replace(view, in_force_permille=200, reason="row 0 has 0 ‰ free")
    assert world.run(1.5, f=60.0) == []
    decision = world.tick(f=60.0)["f"]
    assert decision.capacity_rps == make.table().capacity_rps(50, 200)
    assert kinds([decision]) == [ADD]
    assert "f-0 stays at 20 %: row 0 has 0 ‰ free" in decision.reason
    assert kinds(world.run(2, f=60.0)) == []


def test_one_stuck_on_its_way_counts_as_failed(make: Any, bench: Any) -> None:
    world = bench(*(make.device(f"n{i}") for i in range(3)))
    world.deploy(make.spec(), make.table())
    world.put("f", sm_pct=100, permille=1000)
    world.put("f", sm_pct=100, permille=1000, state=InstanceState.PENDING)
    world.run(58, f=350.0)
    assert len(world.requests()) == 2
    world.run(10, f=350.0)
    assert len(world.requests()) == 3
    assert any("not ready for 60 s" in decision.reason for decision in world.decisions)


def test_one_that_loads_for_minutes_is_not_replaced(make: Any, bench: Any) -> None:
    world = bench(*(make.device(f"n{i}") for i in range(3)))
    world.deploy(make.spec(), make.table())
    world.put("f", sm_pct=100, permille=1000)
    world.put("f", sm_pct=100, permille=1000, state=InstanceState.LOADING)
    world.run(90, f=350.0)
    assert len(world.requests()) == 2


def test_an_slo_that_nothing_meets_keeps_one_at_its_best(make: Any, bench: Any) -> None:
    world = bench()
    world.deploy(make.spec(slo_ms=1), make.table(slo_ms=1))
    world.run(60, f=DemandView(50.0, queued_items_count=10, oldest_wait_s=1.0, p95_s=2.0))
    assert world.requests() == {"f-0": 1000}
    assert "no configuration meets the SLO of 1 ms" in world.decisions[-1].reason


def test_held_by_hand_is_left_alone(make: Any, bench: Any) -> None:
    """Two controllers writing one number (KEDA #5288)."""
    world = bench()
    world.deploy(make.spec(standby=1), make.table())
    world.put("f", permille=200)
    world.held.add("f")
    assert world.run(60, f=500.0) == []
    assert world.run(60, f=0.0) == []
    world.held.clear()
    assert kinds(world.run(1, f=500.0))


# Standby


def test_standbys_are_parked_and_activated_before_a_new_instance(make: Any, bench: Any) -> None:
    world = bench()
    world.deploy(make.spec(standby=1), make.table())
    world.tick()
    standby = next(view for view in world.instances["f"].values() if view.standby)
    assert standby.allocation.request_permille == PARKED_QUOTA_PERMILLE
    assert world.tick(f=1.0)["f"].capacity_rps == make.table().capacity_rps(25, 100)
    world.start_state = InstanceState.LOADING
    decision = world.tick(f=50.0)["f"]
    activated = [a for a in decision.actions if a.instance == standby.instance]
    assert kinds([decision])[0] is UP
    row_is_full = sum(a.to_permille for a in decision.actions if a.kind is UP) >= 1000 - PARKED_QUOTA_PERMILLE
    assert activated or not row_is_full
    if activated:
        assert activated[0].kind is UP
        assert decision.standby_changed
        assert decision.horizontal


def test_from_zero_a_standby_answers_without_a_cold_start(make: Any, bench: Any) -> None:
    world = bench()
    world.deploy(make.spec(min_instances=0, standby=1), make.table())
    world.tick(f=0.0)
    assert world.requests() == {}
    (parked,) = world.instances["f"]
    decision = world.tick(f=DemandView(0.0, queued_items_count=1))["f"]
    assert [(a.kind, a.instance) for a in decision.actions if a.instance == parked] == [(UP, parked)]
    assert parked in world.requests()
    assert "(standby) becomes active" in decision.reason
    world.run(60, f=0.0)
    assert world.requests() == {}
    assert sum(view.standby for view in world.instances["f"].values()) == 1


def test_a_standby_too_many_goes(make: Any, bench: Any) -> None:
    world = bench()
    world.deploy(make.spec(standby=2), make.table())
    world.tick()
    world.specs["f"] = replace(world.specs["f"], standby=0)
    world.run(3, f=0.0)
    assert not any(view.standby for view in world.instances["f"].values())


# In general


def test_state_of_functions_that_went_is_dropped(make: Any, bench: Any) -> None:
    world = bench()
    world.deploy(make.spec(), make.table())
    world.tick(f=1.0)
    del world.specs["f"]
    world.tick()
    assert world.state.functions == {}


@hypothesis_settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.one_of(st.none(), st.floats(0, 300)),
            st.integers(0, 50),
            st.one_of(st.none(), st.floats(0, 2)),
            st.sampled_from(list(InstanceState)),
        ),
        min_size=10,
        max_size=40,
    ),
    st.integers(0, 2),
    st.integers(0, 2),
)
def test_whatever_comes_bounds_hold(make: Any, bench: Any, steps: Any, min_instances: int, standby: int) -> None:
    world = bench(make.device("n0"), make.device("n1"))
    world.deploy(make.spec("f", min_instances=min_instances, max_instances=4, standby=standby), make.table("f"))
    world.deploy(make.spec("g"), make.table("g"))
    for rate, queued, p95_s, state in steps:
        world.start_state = state
        world.tick(f=DemandView(rate, queued_items_count=queued, p95_s=p95_s, oldest_wait_s=queued / 50), g=rate)
        assert min_instances <= len(world.requests("f")) <= 4
        for view in (*world.instances["f"].values(), *world.instances["g"].values()):
            view.allocation.validate()
            assert view.allocation.sm_pct in (25, 50, 75, 100)
            assert view.standby or view.allocation.request_permille % 100 == 0
