"""A function's state as its owner sees it."""

from __future__ import annotations

from collections.abc import Mapping

from hasgpu.gateway.v1 import gateway_pb2 as pb
from hasgpu_core.capacity import CapacityTable
from hasgpu_core.events import FunctionEvent, InstanceEvent
from hasgpu_core.resources import PARKED_QUOTA_PERMILLE, WHOLE_PCT, WHOLE_PERMILLE, InstanceState
from hasgpu_runtime import wire


def condition_of(
    event: FunctionEvent, instances: Mapping[str, InstanceEvent], tables: Mapping[str, CapacityTable]
) -> str:
    """Returns in words how the function is: "ready", "scaled to zero", "starting: ...", "failing: ...".

    What keeps its objective from being met on every device model it has a prediction for is added.
    """
    infeasible = [table.infeasible_reason for table in tables.values()]
    text = _condition(event, instances)
    if infeasible and all(infeasible):
        text += f"; its objective of {event.spec.slo_ms} ms can't be met: {infeasible[0]}"
    return text


def _condition(event: FunctionEvent, instances: Mapping[str, InstanceEvent]) -> str:
    by_state: dict[InstanceState, list[InstanceEvent]] = {}
    for instance in instances.values():
        by_state.setdefault(instance.state, []).append(instance)
    ready = by_state.get(InstanceState.READY, [])
    if any(instance.allocation.request_permille > PARKED_QUOTA_PERMILLE for instance in ready):
        return "ready"
    failed = by_state.get(InstanceState.FAILED, [])
    if failed:
        return f"failing: {failed[0].instance}: {failed[0].reason or 'no reason given'}"
    for state, words in ((InstanceState.LOADING, "loading its model"), (InstanceState.PENDING, "planned")):
        if state in by_state:
            first = by_state[state][0]
            return f"starting: {first.instance} is {words}" + (f" ({first.reason})" if first.reason else "")
    if ready:
        return "standing by: a request wakes a parked instance"
    if InstanceState.DRAINING in by_state or event.spec.min_instances == 0:
        return "scaled to zero"
    return "starting: waiting for an instance to be placed"


def function_status(
    event: FunctionEvent,
    instances: Mapping[str, InstanceEvent],
    tables: Mapping[str, CapacityTable],
    *,
    queued_count: int,
    now_unix_ns: int,
) -> pb.FunctionStatus:
    """Returns the whole state; its capacity is that of the device model which serves the function best."""
    status = pb.FunctionStatus(
        spec=wire.spec_to_proto(event.spec),
        revision=event.revision,
        updated_unix_ns=event.updated_unix_ns,
        instances=[_instance_status(instances[name]) for name in sorted(instances)],
        condition=condition_of(event, instances, tables),
        queued_count=queued_count,
    )
    if tables:
        best = max(tables.values(), key=lambda table: table.capacity_rps(WHOLE_PCT, WHOLE_PERMILLE))
        status.capacity.CopyFrom(
            pb.CapacityStatus(
                device_model=best.device_model,
                basis=best.basis,
                age_ms=max(0, (now_unix_ns - best.computed_unix_ns) // 1_000_000),
                best_millirps=round(best.capacity_rps(WHOLE_PCT, WHOLE_PERMILLE) * 1e3),
                infeasible_reason=best.infeasible_reason,
            )
        )
    return status


def _instance_status(event: InstanceEvent) -> pb.InstanceStatus:
    return pb.InstanceStatus(
        instance=event.instance,
        node=event.node,
        gpu=event.gpu,
        row=event.row,
        state=wire.instance_state_to_proto(event.state),
        reason=event.reason,
        allocation=wire.allocation_to_proto(event.allocation),
        device_time_ns=event.device_time_ns,
        batches_count=event.batches_count,
        restarts_count=event.restarts_count,
        address=event.address,
        allocation_revision=event.allocation_revision,
        pid=event.pid,
    )
