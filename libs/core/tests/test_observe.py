from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from hasgpu_core.events import DemandEvent, DesiredInstance, DeviceEvent, FunctionEvent, InstanceEvent, NodeEvent
from hasgpu_core.function import MIB
from hasgpu_core.observe import ClusterObserver
from hasgpu_core.resources import Allocation, InstanceState, Row


def allocation(sm_pct: int = 50, permille: int = 300) -> Allocation:
    return Allocation(sm_pct, permille, 1000, 64 * MIB)


def instance_event(name: str, *, state: InstanceState = InstanceState.READY, **fields: Any) -> InstanceEvent:
    values: dict[str, Any] = {
        "node": "n0", "gpu": "g0", "row": 0, "reason": "", "address": "", "allocation": allocation(),
        "allocation_revision": 1, "function_revision": 1, "device_model": "cpu-2c", "plan_revision": 1,
    }  # fmt: skip
    values.update(fields)
    return InstanceEvent(function="f", instance=name, state=state, **values)


def observer(make: Any, *nodes: str) -> ClusterObserver:
    observer = ClusterObserver()
    observer.apply_function(FunctionEvent(make.spec(), 1, 0))
    observer.apply_table(make.table())
    for node in nodes or ("n0",):
        observer.apply_node(NodeEvent(node, "", (make.device(node),), 0, 0), 0.0)
    return observer


def test_rows_hold_the_larger_of_desired_and_in_force(make: Any) -> None:
    seen = observer(make)
    seen.apply_instance(instance_event("f-0"))
    seen.set_desired("f", [DesiredInstance("f-0", allocation(permille=700))], 1)
    assert seen.snapshot(0.0).devices[0].rows == (Row(0, 50, 700),)
    seen.set_desired("f", [DesiredInstance("f-0", allocation(permille=100))], 1)
    assert seen.snapshot(0.0).devices[0].rows == (Row(0, 50, 300),)
    seen.apply_instance(instance_event("f-0", allocation=allocation(permille=100)))
    assert seen.snapshot(0.0).devices[0].rows == (Row(0, 50, 100),)
    seen.apply_device(DeviceEvent(make.device(), (Row(0, 50, 250), Row(1, 25, 0)), 0, 0, 0, 0), 0.0)
    assert seen.snapshot(0.0).devices[0].rows == (Row(0, 50, 250),)


def test_room_is_kept_for_desired_instances_that_are_not_bound(make: Any) -> None:
    seen = observer(make)
    seen.set_desired("f", [DesiredInstance(f"f-{i}", allocation(permille=600)) for i in range(2)], 2)
    snapshot = seen.snapshot(0.0)
    assert snapshot.devices[0].rows == (Row(0, 50, 600), Row(1, 50, 600))
    assert snapshot.devices[0].memory_used_bytes == 128 * MIB
    views = snapshot.functions[0].instances
    assert [(view.state, view.node, view.device_model) for view in views] == [
        (InstanceState.PENDING, "", "cpu-2c"),
        (InstanceState.PENDING, "", "cpu-2c"),
    ]


def test_an_instance_being_retired_takes_room_but_is_not_an_instance(make: Any) -> None:
    seen = observer(make)
    seen.apply_instance(instance_event("f-0", state=InstanceState.DRAINING))
    seen.set_desired("f", [], 1)
    snapshot = seen.snapshot(0.0)
    assert snapshot.functions[0].instances == ()
    assert snapshot.devices[0].rows == (Row(0, 50, 300),)
    seen.remove_function("f")
    assert seen.snapshot(0.0).functions == ()
    assert seen.snapshot(0.0).devices[0].rows == (Row(0, 50, 300),)
    seen.remove_instance("f", "f-0")
    assert seen.snapshot(0.0).devices[0].rows == ()


def test_a_lost_nodes_instances_are_not_ready(make: Any) -> None:
    seen = observer(make, "n0", "n1")
    seen.apply_instance(instance_event("f-0"))
    seen.set_desired("f", [DesiredInstance("f-0", allocation())], 1)
    assert seen.snapshot(1.0).functions[0].instances[0].state is InstanceState.READY
    seen.apply_node(NodeEvent("n1", "", (make.device("n1"),), 0, 0), 9.0)
    snapshot = seen.snapshot(10.0)
    view = snapshot.functions[0].instances[0]
    assert (view.state, view.node, view.reason) == (InstanceState.PENDING, "", "node n0 is lost")
    assert [device.info.node for device in snapshot.devices] == ["n1"]
    assert snapshot.devices[0].rows == (Row(0, 50, 300),)  # where it will be bound again
    seen.remove_node("n1")
    assert seen.snapshot(10.0).devices == ()


def test_a_draining_node_offers_no_room(make: Any) -> None:
    seen = observer(make)
    seen.apply_node(NodeEvent("n0", "", (make.device(),), 0, 0, draining=True), 0.0)
    assert seen.snapshot(0.0).devices == ()


def test_running_instances_are_taken_over_when_nothing_was_set(make: Any) -> None:
    seen = observer(make)
    seen.apply_instance(instance_event("f-3"))
    function = seen.snapshot(0.0).functions[0]
    assert [view.instance for view in function.instances] == ["f-3"]
    assert function.next_ordinal == 4
    seen.set_desired("f", [], 7)
    function = seen.snapshot(0.0).functions[0]
    assert (function.instances, function.next_ordinal) == ((), 7)


def test_events_may_be_repeated_and_old_revisions_come_late(make: Any) -> None:
    seen = observer(make)
    seen.apply_instance(instance_event("f-0"))
    seen.set_held("f", True)
    before = seen.snapshot(0.0)
    for _ in range(2):
        seen.apply_instance(instance_event("f-0"))
        seen.apply_node(NodeEvent("n0", "", (make.device(),), 0, 0), 0.0)
        seen.apply_table(make.table())
    seen.apply_function(FunctionEvent(replace(make.spec(), slo_ms=1), 0, 0))
    assert seen.snapshot(0.0) == before
    assert before.functions[0].held
    seen.set_held("f", False)
    seen.remove_table("f", "cpu-2c")
    assert seen.snapshot(0.0).functions[0].tables == {}


def test_demand_reaches_the_view(make: Any) -> None:
    seen = observer(make)
    assert seen.snapshot(0.0).functions[0].demand.rate_rps is None
    assert seen.snapshot(0.0).functions[0].demand.age_s == math.inf
    for at_s, count in ((0.0, 0), (1.0, 5)):
        event = DemandEvent("f", "g", "e", round(at_s * 1e9), count, 0, 0, 0, 0, 2, 0, 0, 0, None, None, None)
        seen.apply_demand(event, at_s)
    assert seen.snapshot(1.0).functions[0].demand.rate_rps == 5.0
    assert seen.snapshot(1.0).functions[0].demand.queued_items_count == 2
