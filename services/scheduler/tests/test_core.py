"""The scheduler's decisions: placing, moving, fencing, waiting."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hasgpu_core.policy.placement import NoRoom, Placement
from hasgpu_core.resources import DeviceHealth, InstanceState
from hasgpu_scheduler.binding import bind
from hasgpu_scheduler.core import TOMBSTONE_S, SchedulerCore


@pytest.fixture
def core() -> SchedulerCore:
    core = SchedulerCore(node_timeout_s=6.0, silence_s=3.0)
    core.load((), (), 0.0)
    core.heard(0.0)
    return core


def run(core: SchedulerCore, now_s: float = 0.0):
    result = core.decide(now_s, fencing_token=1)
    for plan in result.plans:
        core.commit(plan)
    return result


def where(core: SchedulerCore) -> dict[str, tuple[str, str, int, int]]:
    return {
        p.instance: (node, p.gpu, p.row, p.allocation.request_permille)
        for node, plan in core.plans.items()
        for p in plan.instances
    }


def beat(core: SchedulerCore, make, until_s: float, *names: str, start_s: float = 0.0) -> None:
    """Heartbeats of the nodes named, once a second."""
    now_s = start_s
    while now_s <= until_s:
        core.heard(now_s)
        for name in names:
            core.on_node(make.node(name, beat=round(now_s * 10) + 2), now_s)
        now_s += 1.0


def test_places_on_a_shared_row_on_the_node_where_the_function_is_not(core, make):
    core.on_node(make.node("a"), 0.0)
    core.on_node(make.node("b"), 0.0)
    core.accept(make.wanted("f", 1, (0, make.allocation(600)), (1, make.allocation(400))), 0.0)
    core.accept(make.wanted("g", 1, (0, make.allocation(500))), 0.0)
    result = run(core)
    assert where(core) == {
        "f-0": ("a", "cpu0", 0, 600),
        "g-0": ("b", "cpu0", 0, 500),
        "f-1": ("b", "cpu0", 0, 400),
    }
    assert not result.unplaced
    assert {plan.node: plan.fencing_token for plan in result.plans} == {"a": 1, "b": 1}


def test_a_pass_without_news_changes_nothing(core, make):
    core.on_node(make.node("a"), 0.0)
    core.accept(make.wanted("f", 1, (0, make.allocation(600))), 0.0)
    assert run(core).plans
    assert not run(core).plans


def test_while_nothing_comes_in_that_a_pass_looks_at_nothing_is_bound_anew(core, make, monkeypatch):
    passes = []
    monkeypatch.setattr("hasgpu_scheduler.core.bind", lambda *args: passes.append(args) or bind(*args))
    core.on_node(make.node("a"), 0.0)
    core.accept(make.wanted("f", 1, (0, make.allocation(600)), (1, make.allocation(700))), 0.0)
    unplaced = run(core).unplaced
    run(core, 1.0)
    before = len(passes)
    beat(core, make, 4.0, "a", start_s=2.0)
    assert run(core, 4.0).unplaced == unplaced
    assert len(passes) == before
    core.accept(make.wanted("f", 2, (0, make.allocation(300)), (1, make.allocation(700))), 4.5)
    assert not run(core, 4.5).unplaced
    assert run(core, 11.0).lost == ()  # the bus was silent too
    core.heard(11.5)
    core.on_node_gone("a")
    assert run(core, 12.0).unplaced


def test_a_live_node_without_work_gets_an_empty_plan(core, make):
    core.on_node(make.node("a"), 0.0)
    (plan,) = run(core).plans
    assert (plan.node, plan.revision, plan.instances) == ("a", 1, ())


def test_what_does_not_fit_waits_with_the_reason_and_is_placed_when_room_appears(core, make):
    core.on_node(make.node("a"), 0.0)
    core.accept(make.wanted("f", 1, (0, make.allocation(800))), 0.0)
    core.accept(make.wanted("g", 1, (0, make.allocation(500))), 0.0)
    result = run(core)
    assert [(item.function, item.desired.instance) for item in result.unplaced] == [("g", "g-0")]
    assert "200 ‰" in result.unplaced[0].reason
    core.accept(make.wanted("f", 2, (0, make.allocation(400))), 0.0)
    assert not run(core).unplaced
    assert where(core)["g-0"] == ("a", "cpu0", 0, 500)


def test_an_older_revision_is_stale_and_the_same_is_not(core, make):
    core.accept(make.wanted("f", 5, (0, make.allocation())), 0.0)
    assert core.is_stale(make.wanted("f", 4))
    assert not core.is_stale(make.wanted("f", 5))
    assert not core.is_stale(make.wanted("g", 1))


def test_rooms_follow_the_newest_share_in_force(core, make):
    """A vertical change that the scheduler was never told of counts when the agent reports it."""
    core.on_node(make.node("a"), 0.0)
    core.accept(make.wanted("f", 1, (0, make.allocation(300))), 0.0)
    run(core)
    core.on_instance(make.status("f-0", "a", make.allocation(900), 7))
    core.accept(make.wanted("g", 1, (0, make.allocation(200))), 0.0)
    result = run(core)
    assert [item.desired.instance for item in result.unplaced] == ["g-0"]
    (planned,) = core.plans["a"].instances
    assert (planned.allocation.request_permille, planned.allocation_revision) == (900, 7)
    core.on_instance(make.status("f-0", "a", make.allocation(100), 6))  # late and older: no effect
    assert [item.desired.instance for item in run(core).unplaced] == ["g-0"]


def test_a_command_renews_the_shares_of_running_instances(core, make):
    core.on_node(make.node("a"), 0.0)
    core.accept(make.wanted("f", 1, (0, make.allocation(300)), (1, make.allocation(300))), 0.0)
    run(core)
    core.on_instance(make.status("f-0", "a", make.allocation(500), 2))
    core.accept(make.wanted("f", 3, (0, make.allocation(200)), (1, make.allocation(800))), 0.0)
    run(core)
    assert [(p.instance, p.allocation.request_permille, p.allocation_revision) for p in core.plans["a"].instances] == [
        ("f-0", 200, 3),
        ("f-1", 800, 3),
    ]


def test_growth_without_room_keeps_the_share_and_says_so(core, make):
    core.on_node(make.node("a"), 0.0)
    core.accept(make.wanted("f", 1, (0, make.allocation(500))), 0.0)
    core.accept(make.wanted("g", 1, (0, make.allocation(400))), 0.0)
    run(core)
    core.accept(make.wanted("g", 2, (0, make.allocation(700))), 0.0)
    result = run(core)
    assert where(core)["g-0"][3] == 400
    assert "100 ‰ free" in result.unplaced[0].reason


def test_who_is_not_ready_makes_way_for_growth_that_happened(core, make):
    core.on_node(make.node("a"), 0.0)
    core.on_node(make.node("b"), 0.0)
    core.accept(make.wanted("f", 1, (0, make.allocation(500))), 0.0)
    run(core)
    core.on_instance(make.status("f-0", "a", make.allocation(500), 1))
    core.accept(make.wanted("g", 1, (0, make.allocation(400))), 0.0)
    run(core)
    assert where(core)["g-0"][0] == "a"
    core.on_instance(make.status("f-0", "a", make.allocation(900), 2))
    run(core)
    assert where(core) == {"f-0": ("a", "cpu0", 0, 900), "g-0": ("b", "cpu0", 0, 400)}


def test_another_sm_share_means_another_row(core, make):
    core.on_node(make.node("a"), 0.0)
    core.accept(make.wanted("f", 1, (0, make.allocation(300, sm_pct=50)), (1, make.allocation(300, sm_pct=50))), 0.0)
    run(core)
    core.accept(make.wanted("f", 2, (0, make.allocation(300, sm_pct=25)), (1, make.allocation(300, sm_pct=50))), 0.0)
    run(core)
    assert where(core) == {"f-0": ("a", "cpu0", 1, 300), "f-1": ("a", "cpu0", 0, 300)}


def test_row_indices_stay_when_a_lower_row_vanishes(core, make):
    core.on_node(make.node("a"), 0.0)
    core.accept(make.wanted("f", 1, (0, make.allocation(300, sm_pct=50))), 0.0)
    core.accept(make.wanted("g", 1, (0, make.allocation(300, sm_pct=25))), 0.0)
    run(core)
    rows = {instance: place[2] for instance, place in where(core).items()}
    core.accept(make.wanted("f", 2), 0.0)
    run(core)
    assert where(core)["g-0"][2] == rows["g-0"] == 1


def test_instances_of_a_silent_node_are_rebound_with_the_same_ids(core, make):
    core.on_node(make.node("a"), 0.0)
    core.accept(make.wanted("f", 1, (0, make.allocation(600)), (1, make.allocation(300))), 0.0)
    run(core)
    first = core.plans["a"]
    beat(core, make, 7.0, "b")
    result = run(core, 7.0)
    assert result.lost == ("a",)
    assert [plan.node for plan in result.plans] == ["a", "b"]  # given up before it is taken on
    assert core.plans["a"].instances == ()
    assert core.plans["a"].revision == first.revision + 1
    assert {i: place[0] for i, place in where(core).items()} == {"f-0": "b", "f-1": "b"}
    core.on_node(make.node("a", beat=99), 8.0)
    assert run(core, 8.0).returned == ("a",)
    assert core.plans["a"].instances == ()


def test_without_room_elsewhere_a_lost_node_keeps_its_plan_and_the_reason_shows(core, make):
    core.on_node(make.node("a"), 0.0)
    core.accept(make.wanted("f", 1, (0, make.allocation(600))), 0.0)
    run(core)
    core.heard(6.5)
    core.heard(7.0)
    core.heard(9.0)
    core.on_node(make.node("a", beat=1), 0.0)
    beat(core, make, 16.0, start_s=9.0)
    result = run(core, 16.0)
    assert result.lost == ("a",)
    assert not result.plans
    assert "node a is lost" in result.unplaced[0].reason
    core.on_node(make.node("b"), 17.0)
    assert not run(core, 17.0).unplaced
    assert where(core)["f-0"][0] == "b"
    assert core.plans["a"].instances == ()


def test_the_bus_being_away_loses_no_node(core, make):
    core.on_node(make.node("a"), 0.0)
    core.on_node(make.node("b"), 0.0)
    core.accept(make.wanted("f", 1, (0, make.allocation(600))), 0.0)
    run(core)
    assert not run(core, 60.0).lost  # nothing was heard at all
    core.heard(61.0)
    assert not run(core, 61.0).lost  # it is back, and everybody has a whole time-out again
    beat(core, make, 68.0, "b", start_s=62.0)
    assert run(core, 68.0).lost == ("a",)


def test_last_words_delivered_again_raise_no_dead(core, make):
    last = make.node("a", beat=1)
    core.on_node(last, 0.0)
    beat(core, make, 7.0, "b")
    assert run(core, 7.0).lost == ("a",)
    core.on_node(last, 7.5)
    assert not core.nodes["a"].alive
    core.on_node(make.node("a", beat=2), 7.6)
    assert core.nodes["a"].alive


def test_after_a_restart_nodes_have_a_time_out_before_they_are_lost(core, make):
    core.on_node(make.node("a"), 0.0)
    core.accept(make.wanted("f", 1, (0, make.allocation(600))), 0.0)
    run(core)
    again = SchedulerCore(node_timeout_s=6.0, silence_s=3.0)
    again.load(core.plans.values(), core.wanted.values(), 100.0)
    beat(again, make, 105.0, "b", start_s=100.0)
    assert not run(again, 105.0).lost
    assert where(again) == where(core)
    beat(again, make, 107.0, "b", start_s=106.0)
    assert run(again, 107.0).lost == ("a",)
    assert where(again)["f-0"][0] == "b"


def test_a_draining_node_gets_nothing_and_gives_up_what_fits_elsewhere(core, make):
    core.on_node(make.node("a"), 0.0)
    core.accept(make.wanted("f", 1, (0, make.allocation(600)), (1, make.allocation(400))), 0.0)
    run(core)
    core.on_node(make.node("a", beat=2, draining=True), 1.0)
    result = run(core, 1.0)
    assert {item.desired.instance for item in result.unplaced} == {"f-0", "f-1"}
    assert all("drains" in item.reason for item in result.unplaced)
    assert {place[0] for place in where(core).values()} == {"a"}
    core.on_node(make.node("b"), 1.0)
    assert not run(core, 1.0).unplaced
    assert {place[0] for place in where(core).values()} == {"b"}


def test_a_withdrawn_node_is_lost_at_once_and_its_empty_plan_is_purged(core, make):
    core.on_node(make.node("a"), 0.0)
    run(core)
    core.on_announced("a", core.plans["a"])
    core.on_node_gone("a")
    run(core, 0.1)
    assert core.to_purge() == ("a",)
    core.on_announced("a", None)
    assert core.unannounced() == ()
    core.on_node(make.node("a", beat=5), 1.0)
    assert [plan.node for plan in core.unannounced()] == ["a"]


def test_a_device_that_is_gone_gives_up_its_instances(core, make):
    core.on_node(make.node("a", gpus=("cpu0", "cpu1")), 0.0)
    core.accept(make.wanted("f", 1, (0, make.allocation(600)), (1, make.allocation(600))), 0.0)
    run(core)
    core.on_node(make.node("a", beat=2, gpus=("cpu1",)), 1.0)
    result = run(core, 1.0)
    assert list(where(core).values()) == [("a", "cpu1", 0, 600)]
    assert "device cpu0 of node a is gone" in result.unplaced[0].reason


def test_a_deleted_function_leaves_its_plans_and_is_forgotten_later(core, make):
    core.on_node(make.node("a"), 0.0)
    core.accept(make.wanted("f", 1, (0, make.allocation(600))), 0.0)
    run(core)
    core.accept(make.wanted("f", 2), 1.0)
    run(core, 1.0)
    assert where(core) == {}
    assert core.is_stale(make.wanted("f", 1))
    assert core.to_forget(TOMBSTONE_S) == ()
    assert core.to_forget(TOMBSTONE_S + 2.0) == ("f",)


def test_revisions_go_on_from_what_was_announced_when_the_store_is_lost(core, make):
    core.on_node(make.node("a"), 0.0)
    run(core)
    announced = core.plans["a"]
    again = SchedulerCore(node_timeout_s=6.0, silence_s=3.0)
    again.load((), (), 0.0)
    again.heard(0.0)
    again.on_announced("a", announced)
    again.on_node(make.node("a"), 0.0)
    (plan,) = run(again).plans
    assert plan.revision == announced.revision + 1


def test_an_id_in_two_plans_survives_once(core, make):
    core.on_node(make.node("a"), 0.0)
    core.on_node(make.node("b"), 0.0)
    core.accept(make.wanted("f", 1, (0, make.allocation(600))), 0.0)
    run(core)
    (planned,) = core.plans["a"].instances
    core.commit(type(core.plans["b"])("b", 9, (planned,)))
    run(core)
    assert where(core) == {"f-0": ("a", "cpu0", 0, 600)}
    assert core.plans["b"].instances == ()


def test_what_if_places_nothing(core, make):
    core.on_node(make.node("a"), 0.0)
    run(core)
    found = core.what_if(make.allocation(600), 0.0)
    assert isinstance(found, Placement)
    assert (found.node, found.row) == ("a", 0)
    assert isinstance(core.what_if(make.allocation(600, memory_mib=1 << 20), 0.0), NoRoom)
    assert where(core) == {}


def test_a_reported_share_of_another_node_does_not_count(core, make):
    core.on_node(make.node("a"), 0.0)
    core.accept(make.wanted("f", 1, (0, make.allocation(300))), 0.0)
    run(core)
    core.on_instance(make.status("f-0", "elsewhere", make.allocation(900), 9, state=InstanceState.READY))
    assert not run(core).plans


@pytest.mark.parametrize("state", [InstanceState.READY, InstanceState.LOADING])
def test_reports_that_arrive_out_of_step_over_fill_no_row(core, make, state):
    """One grew into the room that another gave up; the report of the latter is still on its way."""
    core.on_node(make.node("a"), 0.0)
    core.accept(make.wanted("f", 1, (0, make.allocation(500)), (1, make.allocation(400))), 0.0)
    run(core)
    core.on_instance(make.status("f-1", "a", make.allocation(400), 1, state=InstanceState.READY))
    core.on_instance(make.status("f-0", "a", make.allocation(900), 2, state=state))
    run(core)
    assert {i: place[3] for i, place in where(core).items()} == {"f-0": 500, "f-1": 400}
    core.on_instance(make.status("f-1", "a", make.allocation(100), 2))
    run(core)
    assert {i: place[3] for i, place in where(core).items()} == {"f-0": 900, "f-1": 100}


def test_a_node_that_had_the_function_before_is_preferred(core, make):
    for name in ("a", "b"):
        core.on_node(make.node(name), 0.0)
    core.accept(make.wanted("x", 1, (0, make.allocation(900, 75)), (1, make.allocation(900, 75))), 0.0)
    core.accept(make.wanted("f", 1, (0, make.allocation(300, 25))), 0.0)
    run(core)
    home = where(core)["f-0"][0]
    other = "b" if home == "a" else "a"
    core.on_instance(make.status("f-0", other, make.allocation(300, 25), 1))
    core.on_instance_gone("f-0")
    core.accept(make.wanted("f", 2), 0.0)
    run(core)
    core.accept(make.wanted("f", 3, (1, make.allocation(300, 25))), 0.0)
    run(core)
    assert where(core)["f-1"][0] == other


def test_a_degraded_device_is_used_when_nothing_else_has_room_and_a_lost_one_never(core, make):
    sick = replace(make.device("a"), health=DeviceHealth.DEGRADED, health_reason="hot")
    core.on_node(replace(make.node("a"), devices=(sick,)), 0.0)
    core.on_node(make.node("b"), 0.0)
    core.accept(make.wanted("f", 1, *((n, make.allocation(800)) for n in range(2))), 0.0)
    run(core, 0.0)
    core.accept(make.wanted("f", 2), 1.0)
    run(core, 1.0)
    core.heard(40.0)
    for name in ("a", "b"):
        devices = (sick,) if name == "a" else make.node("b").devices
        core.on_node(replace(make.node(name, beat=2), devices=devices), 40.0)
    core.accept(make.wanted("g", 1, (0, make.allocation(800))), 40.0)
    run(core, 40.0)
    assert where(core)["g-0"][0] == "b"
    core.accept(make.wanted("h", 1, (0, make.allocation(800))), 40.0)
    run(core, 40.0)
    assert where(core)["h-0"][0] == "a"
    core.on_node(replace(make.node("a", beat=3), devices=(replace(sick, health=DeviceHealth.LOST),)), 41.0)
    run(core, 41.0)
    assert "h-0" not in where(core)
    assert "a" not in {place[0] for place in where(core).values()}
